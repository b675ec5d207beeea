"""Arrays as zarr chunks: which chunks an array has, and how they make up a shard. Accesses no storage; no JAX.

A chunk is a shard of the array as it was saved, or an equal part of one. It is stored as the plain little-endian bytes
of its values, in an object of its own, beside the `zarr.json` of the array. Any reader of zarr 3 can open it.
"""

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Self

import numpy as np

METADATA_FILE = "zarr.json"
MAX_CHUNK_BYTES = 64 << 20
"""An object is written by one request, which holds it in memory."""

type Index = tuple[slice, ...]
"""The part of an array that a shard or chunk has."""


class ChunkedArray(NamedTuple):
    """Shape, dtype and shape of the chunks of a stored array."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]

    @classmethod
    def of(cls, shape: tuple[int, ...], shard_shape: Sequence[int], dtype: np.dtype) -> Self:
        """Returns the chunks that an array with these shards is saved in."""
        chunk = [max(1, size) for size in shard_shape]
        while math.prod(chunk) * dtype.itemsize > MAX_CHUNK_BYTES and max(chunk) > 1:
            dim = chunk.index(max(chunk))
            factor = next(factor for factor in range(2, chunk[dim] + 1) if chunk[dim] % factor == 0)
            chunk[dim] //= factor
        return cls(shape, dtype, tuple(chunk))

    @classmethod
    def decode(cls, metadata: bytes) -> Self:
        """Parses the `zarr.json` of an array."""
        content = json.loads(metadata)
        chunk = content["chunk_grid"]["configuration"]["chunk_shape"]
        return cls(tuple(content["shape"]), np.dtype(content["data_type"]), tuple(chunk))

    def encode(self) -> bytes:
        """Returns the `zarr.json` of the array."""
        content = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": self.shape,
            "data_type": self.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": self.chunk}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
            "fill_value": False if self.dtype == bool else 0,
        }
        return json.dumps(content).encode()

    def chunks_in(self, index: Index) -> Iterator[tuple[str, Index]]:
        """Yields the key and the index of each chunk that a part of the array needs."""
        bounds = [part.indices(size) for part, size in zip(index, self.shape, strict=True)]
        if any(start >= stop for start, stop, _ in bounds):
            return
        ranges = [
            range(start // size, -(-stop // size)) for (start, stop, _), size in zip(bounds, self.chunk, strict=True)
        ]
        for cell in itertools.product(*ranges):
            lows = [number * size for number, size in zip(cell, self.chunk, strict=True)]
            yield "/".join(("c", *map(str, cell))), tuple(map(slice, lows, np.add(lows, self.chunk).tolist()))

    def values(self, content: bytes) -> np.ndarray:
        """Returns the values of a chunk."""
        return np.frombuffer(content, self.dtype).reshape(self.chunk)


class Shard:
    """A part of an array that is put together from chunks.

    Attributes:
        missing: number of chunks that it still needs.
    """

    def __init__(self, array: ChunkedArray, index: Index) -> None:
        self._bounds = [part.indices(size)[:2] for part, size in zip(index, array.shape, strict=True)]
        self._dtype = array.dtype
        self._values: np.ndarray | None = None
        self.missing = sum(1 for _ in array.chunks_in(index))

    def add(self, index: Index, values: np.ndarray) -> None:
        """Copies what the shard has of a chunk."""
        if self._values is None:  # memory is taken late: the shards of all arrays may not fit
            self._values = self._empty()
        target, source = [], []
        for (start, stop), part in zip(self._bounds, index, strict=True):
            low, high = max(start, part.start), min(stop, part.stop)
            target.append(slice(low - start, high - start))
            source.append(slice(low - part.start, high - part.start))
        self._values[tuple(target)] = values[tuple(source)]
        self.missing -= 1

    def take(self) -> np.ndarray:
        """Returns the values, and forgets them."""
        values, self._values = self._values, None
        return self._empty() if values is None else values

    def _empty(self) -> np.ndarray:
        return np.empty([stop - start for start, stop in self._bounds], self._dtype)


def relative(index: Index, shape: Sequence[int], chunk_index: Index) -> Index:
    """Returns where a chunk is in the shard with this index, of an array with this shape."""
    starts = [part.indices(size)[0] for part, size in zip(index, shape, strict=True)]
    return tuple(slice(part.start - start, part.stop - start) for start, part in zip(starts, chunk_index, strict=True))
