"""Reuses the memory of batches.

A run makes and drops thousands of batches. The kernel clears fresh memory page by page, which costs more than filling
it. So memory returns to a pool when nothing refers to its array any more, neither a view nor a device array that shares
the memory. The pool grows to the most memory that was in use at once. Many threads may use it, because appending to a
list and popping from it are atomic.
"""

import mmap
import weakref
from collections import defaultdict
from math import prod

import numpy as np

_MIN_BYTES = 64 * 1024  # NumPy's allocator already reuses smaller arrays
_free: defaultdict[int, list[mmap.mmap]] = defaultdict(list)  # the pool, by number of pages


def empty(shape: tuple[int, ...], dtype: type | np.dtype) -> np.ndarray:
    """Returns an array with arbitrary contents, like `numpy.empty`."""
    dtype = np.dtype(dtype)
    count = prod(shape)
    if count * dtype.itemsize < _MIN_BYTES:
        return np.empty(shape, dtype)
    pages = -(-count * dtype.itemsize // mmap.PAGESIZE)  # rounded up
    try:  # without a check before, because another thread may take the last one
        memory = _free[pages].pop()
    except IndexError:
        memory = mmap.mmap(-1, pages * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # `memory` is no NumPy array, so this array is the base of all views and lives as long as any of them.
    array = np.frombuffer(memory, dtype, count)
    weakref.finalize(array, _free[pages].append, memory).atexit = False  # nothing to return when Python exits
    return array.reshape(shape)
