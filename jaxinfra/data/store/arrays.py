"""Arrays on disk or in a bucket that grow along their first dimension: zarr 3 through TensorStore.

A *chunk* is what is read and checked as a whole; a *shard* is a file with many chunks and their index. Every chunk
carries a CRC-32C that each read checks, and a missing chunk is an error, never zeros. Failures are raised as DataError
or StorageError.

Chunk size was measured with batches of 64 random reads of 1,025 tokens, on two cores and with chunks outside the cache.
The CPU time of reading whole chunks and hashing them (see `blocks`) is 19 ns a token with chunks of 2 Ki and 4 Ki
tokens, and 24 ns with 8 Ki. Without hashes it is 19, 17 and 21 ns, and more with larger chunks: 38 ns with 16 Ki, 66 ns
with 64 Ki. One read of all ranges takes a third less than separate reads. Zstandard saves a third of the space and
costs a third to two thirds of the speed, so chunks are not compressed.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import tensorstore as ts

from jaxinfra.storage import connection
from jaxinfra.storage.errors import call_storage

CHUNK = 4 * 1024
SHARD = 16 * 1024 * 1024
"""Default elements of a chunk and of a shard."""
SMALL_CHUNK, SMALL_SHARD = 512, 1024 * 1024
"""Chunk and shard of arrays that are read a few elements at a time, such as offsets."""
CACHE_BYTES = 32 * 1024 * 1024
"""Caches the indices of shards. Chunks are read at random and seldom again, so a larger cache would not help."""


def create(
    path: str, dtype: np.dtype, *, shape: tuple[int, ...] = (), chunk: int = CHUNK, shard: int = SHARD
) -> ts.TensorStore:
    """Creates an empty array in a new folder; `append` makes it longer.

    Args:
        path: local folder or URL.
        dtype: an integer type; its largest value pads the last chunk, and no token has it.
        shape: shape of an element; () for scalars.
        chunk: number of elements in a chunk, the unit of reading.
        shard: number of elements in a file, a multiple of `chunk`.
    """
    crc = {"name": "crc32c"}
    plain = {"name": "bytes", "configuration": {"endian": "little"}}
    sharding = {"chunk_shape": [chunk, *shape], "codecs": [plain, crc], "index_codecs": [plain, crc]}
    spec = _spec(path) | {
        "store_data_equal_to_fill_value": True,  # because a chunk that is not stored is an error
        "metadata": {
            "shape": [0, *shape],
            "data_type": dtype.name,
            "fill_value": int(np.iinfo(dtype).max),
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard, *shape]}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        },
    }
    context = connection.tensorstore_context()
    return call_storage(path, lambda: ts.open(ts.Spec(spec), create=True, context=context).result(), writing=True)


def append(array: ts.TensorStore, path: str, values: np.ndarray) -> ts.TensorStore:
    """Writes values after the end and returns the longer array; fastest if the end is at a multiple of `shard`."""
    start = array.shape[0]

    def write() -> ts.TensorStore:
        longer = array.resize(exclusive_max=[start + len(values), *values.shape[1:]]).result()
        longer[start : start + len(values)].write(values).result()
        return longer

    return call_storage(path, write, writing=True)


def open_array(path: str, *, cached: bool = True) -> ts.TensorStore:
    """Opens an array that is complete; DataError if it is missing or its metadata is damaged."""
    # The cache, which all arrays share, may still hold another array that was at this path, so it is checked now.
    context = connection.tensorstore_context(cache_bytes=CACHE_BYTES if cached else 0)
    spec = _spec(path) | {"recheck_cached_data": "open", "recheck_cached_metadata": "open"}
    return call_storage(path, lambda: ts.open(ts.Spec(spec), read=True, context=context).result())


def shard_of(array: ts.TensorStore, element: int) -> str:
    """Returns the name of the file that holds an element, such as `c/3`."""
    shape = array.chunk_layout.write_chunk.shape
    assert shape is not None and shape[0] is not None, "a stored array has chunks"
    indices = [element // shape[0]] + [0] * (array.ndim - 1)  # shards are split along the first dimension only
    return "/".join(map(str, ["c", *indices]))


def read_ranges(array: ts.TensorStore, path: str, starts: Sequence[int], lengths: Sequence[int]) -> np.ndarray:
    """Reads `array[start : start + n]` for every start and length n at once, concatenated.

    DataError if a range is outside the array, or a chunk is missing or damaged; StorageError if it cannot be read.
    """
    if not len(starts):
        return np.empty((0, *array.shape[1:]), array.dtype.numpy_dtype)
    return read_several([(array, starts, lengths)], path)


def read_several(parts: Iterable[tuple[ts.TensorStore, Sequence[int], Sequence[int]]], path: str) -> np.ndarray:
    """Reads ranges of several arrays of one type in one request, concatenated; raises as `read_ranges`."""

    def read() -> np.ndarray:
        ranges = [
            array[start : start + n]
            for array, starts, lengths in parts
            for start, n in zip(starts, lengths, strict=True)
        ]
        with ts.Batch() as batch:  # opens each shard once, not once for each range
            future = ts.concat(ranges, axis=0).read(batch=batch)
        return future.result()

    return call_storage(path, read)


def _spec(path: str) -> dict[str, object]:
    """Returns the part of a TensorStore spec that creating and opening share."""
    return {
        "driver": "zarr3",
        "kvstore": connection.kvstore_spec(connection.normalize_url(path)),
        "fill_missing_data_reads": False,
    }
