"""Arrays in memory that is used again: what the batches of a run are put into.

A batch is made, copied to the devices and dropped, thousands of times; fresh memory for each would be cleared by the
kernel page by page, which costs more than filling it. Memory comes back here when nothing refers to its array any
more, not a view of it and no device array that shares it: nobody has to give it back, and nobody can too early. What
is kept is as much as was ever in use at once. Safe to use from many threads.
"""

import mmap
import weakref
from collections import defaultdict
from math import prod

import numpy as np

_LEAST_BYTES = 64 * 1024  # smaller arrays are left to NumPy, whose allocator keeps them by itself
_free: defaultdict[int, list[mmap.mmap]] = defaultdict(list)


def empty(shape: tuple[int, ...], dtype: type | np.dtype) -> np.ndarray:
    """An array with arbitrary contents, as `numpy.empty`."""
    kind = np.dtype(dtype)
    count = prod(shape)
    if count * kind.itemsize < _LEAST_BYTES:
        return np.empty(shape, kind)
    pages = -(-count * kind.itemsize // mmap.PAGESIZE)
    try:
        memory = _free[pages].pop()
    except IndexError:
        memory = mmap.mmap(-1, pages * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # The memory is no array, so that NumPy has every view refer to this one, which lives as long as any of them.
    array = np.frombuffer(memory, kind, count)
    weakref.finalize(array, _free[pages].append, memory).atexit = False
    return array.reshape(shape)
