"""Limits what reads and writes of a checkpoint hold in host memory at once. Imports no JAX."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import tensorstore as ts

from jaxinfra.checkpoint.zarr_chunks import ChunkedArray, Index


def in_window[T](requests: Iterable[tuple[Callable[[], ts.Future[T]], int]], max_bytes: int) -> Iterator[ts.Future[T]]:
    """Starts reads or writes, and yields them in order, to wait for the result of each; the next are on their way then.

    A request is what starts it, and its bytes. All on their way fit in `max_bytes`, or there is only one.
    """
    pending, pending_bytes = deque[tuple[ts.Future[T], int]](), 0
    for start, num_bytes in requests:
        while pending and pending_bytes + num_bytes > max_bytes:
            first, first_bytes = pending.popleft()
            yield first
            del first  # it holds what was read
            pending_bytes -= first_bytes
        pending.append((start(), num_bytes))
        pending_bytes += num_bytes
    while pending:
        yield pending.popleft()[0]


def read_bytes(array: ts.TensorStore, index: Index) -> int:
    """Returns the bytes of the chunks that a part of an array is read from, each of which is read as a whole."""
    shape, dtype = tuple(array.shape), array.dtype.numpy_dtype
    chunk = tuple(size or 1 for size in array.chunk_layout.read_chunk.shape or shape)
    return sum(1 for _ in ChunkedArray(shape, dtype, chunk).chunks_in(index)) * math.prod(chunk) * dtype.itemsize
