"""Reuses the memory of batches.

A run makes and drops thousands of batches. The kernel clears fresh memory page by page, which costs more than filling
it. So memory returns to a pool here when the last reference to its array goes: every view, and every device array that
shares it. The pool holds as much as was ever in use at once. Safe to use from many threads.
"""

import mmap
import weakref
from collections import defaultdict
from math import prod

import numpy as np

_MIN_BYTES = 64 * 1024  # NumPy's allocator already reuses smaller arrays
_free: defaultdict[int, list[mmap.mmap]] = defaultdict(list)


def empty(shape: tuple[int, ...], dtype: type | np.dtype) -> np.ndarray:
    """Returns an array with arbitrary contents, like `numpy.empty`."""
    dtype = np.dtype(dtype)
    count = prod(shape)
    if count * dtype.itemsize < _MIN_BYTES:
        return np.empty(shape, dtype)
    pages = -(-count * dtype.itemsize // mmap.PAGESIZE)
    try:
        memory = _free[pages].pop()
    except IndexError:
        memory = mmap.mmap(-1, pages * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # `memory` is no NumPy array, so this array is the base of all views and lives as long as any of them.
    array = np.frombuffer(memory, dtype, count)
    weakref.finalize(array, _free[pages].append, memory).atexit = False
    return array.reshape(shape)
