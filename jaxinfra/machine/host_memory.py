"""Keeps the memory that XLA frees on a CPU, because each step allocates the same buffers again.

By default glibc returns large buffers to Linux, which zeroes every page of the next ones. On two cores that took a
quarter of the processor time of the quickstart; without it a step makes 1.4 times as many tokens a second. It costs
memory: 1.5 GiB where there was 0.9. Several emulated devices gain little, as their buffers are smaller, and compile
more slowly, as their threads share one heap.
"""

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # parameters of mallopt(3)
_MAX_INT = 2**31 - 1
_DEFAULT_MMAP_MAX, _DEFAULT_TRIM_THRESHOLD = 65536, 128 * 1024


def keep_freed_memory() -> None:
    """Tells glibc's malloc to keep freed memory; must be called before threads start.

    Does nothing with another C library, or if the environment has settings of malloc.
    """
    # The other heaps cannot hold large buffers.
    _set((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, _MAX_INT))


def return_freed_memory() -> None:
    """Tells glibc's malloc to return large buffers from now on, as by default: a step then needs half the memory."""
    _set((_MMAP_MAX, _DEFAULT_MMAP_MAX), (_TRIM_THRESHOLD, _DEFAULT_TRIM_THRESHOLD))


def _set(*parameters: tuple[int, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or any(name.startswith("MALLOC_") for name in os.environ):
        return
    for parameter, value in parameters:
        mallopt(parameter, value)
