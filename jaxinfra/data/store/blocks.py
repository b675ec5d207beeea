"""Reads the arrays of a version block by block, and compares each block with its hash.

The CRC of a chunk (see `arrays`) says that the chunk is what was once written there. It says nothing about a chunk or
file that is whole by itself, but stale, swapped with another, or of another store. So each block has a hash in a table
beside its array, each file of the table one in the manifest, and the fingerprint of the version covers those.

A block is a chunk of the array, which is read whole anyway. A block that does not fit its hash is read once more, past
all caches, since a bucket or a cache may fail once.
"""

import logging
import math
from collections.abc import Callable, Iterator

import numpy as np
import xxhash

from jaxinfra.data.store import arrays
from jaxinfra.data.store.layout import DESCRIPTION, TABLE_HASHES, table_name
from jaxinfra.data.store.manifest import Manifest
from jaxinfra.errors import DataError
from jaxinfra.storage.errors import DAMAGED_VERSION_FIX
from jaxinfra.storage.objects import ObjectStore

_SHOWN = 8  # digits of a hash in messages

_log = logging.getLogger(__name__)


def hash_blocks(values: np.ndarray, block: int) -> np.ndarray:
    """Returns the XXH3-64 of each `block` elements as little-endian integers, uint64[blocks]."""
    little_endian = values.astype(values.dtype.newbyteorder("<"), copy=False)
    content = memoryview(np.ascontiguousarray(little_endian).reshape(-1).view(np.uint8))
    size = block * values.itemsize * math.prod(values.shape[1:])
    starts = range(0, len(content), size)
    return np.array([xxhash.xxh3_64_intdigest(content[start : start + size]) for start in starts], np.uint64)


def read_file(storage: ObjectStore, manifest: Manifest, name: str) -> bytes:
    """Reads a file whose hash is in the manifest; DataError if it is missing or does not fit, twice."""
    url, expected, found = storage.url_of(name), manifest.files[name].digest, ""
    for read in (storage.read, storage.read_or_none):
        content = read(name)
        if content is None:
            break
        if (digest := xxhash.xxh3_128_hexdigest(content)) == expected:
            if found:
                _log.warning("%s: was damaged when it was first read, is whole now", url)
            return content
        found = f"has the hash {digest[:_SHOWN]}, expected {str(expected)[:_SHOWN]}"
    raise DataError(f"{url}: {found}; {DAMAGED_VERSION_FIX}")


class CheckedArray:
    """An array of a version, open for reading; safe to use from many threads.

    Attributes:
        name: of the array in the version, such as `train/tokens`.
        info: its elements and blocks.
    """

    def __init__(self, storage: ObjectStore, manifest: Manifest, name: str, locate: Callable[[int, int], str]):
        """Opens the array; DataError if its description is damaged or missing.

        `locate(first, end)` describes a range of elements for messages, such as the documents that it is part of.
        """
        self.name, self.info, self._locate = name, manifest.arrays[name], locate
        self._storage, self._manifest, self._path = storage, manifest, storage.url_of(name)
        self._tables: dict[int, np.ndarray] = {}
        read_file(storage, manifest, f"{name}/{DESCRIPTION}")
        self._array = arrays.open_array(self._path)
        if self._array.shape[0] != self.info.elements:
            raise DataError(
                f"{self._path}: has {self._array.shape[0]} elements, expected {self.info.elements}; "
                f"{DAMAGED_VERSION_FIX}"
            )

    def read(self, starts_N: np.ndarray, lengths_N: np.ndarray) -> np.ndarray:
        """Reads the ranges from each start on, concatenated.

        Raises:
            DataError: a range is outside the array, or a block of it is damaged.
            StorageError: the storage cannot be read.
        """
        block, ends_N = self.info.block, starts_N + lengths_N
        if len(starts_N) and (starts_N.min() < 0 or ends_N.max() > self.info.elements):
            i = int(np.argmax((starts_N < 0) | (ends_N > self.info.elements)))
            raise DataError(
                f"{self._path}: elements {starts_N[i]} to {ends_N[i]} are outside its {self.info.elements}; "
                f"{DAMAGED_VERSION_FIX}"
            )
        first_N = starts_N // block
        counts_N = np.where(lengths_N > 0, (ends_N - 1) // block - first_N + 1, 0)
        # Ranges in the blocks 2 to 3 and 3 to 5 need the blocks 2, 3, 4 and 5, each once.
        all_blocks = np.repeat(first_N - np.cumsum(counts_N) + counts_N, counts_N) + np.arange(counts_N.sum())
        blocks_K = np.unique(all_blocks)
        values = self._read_blocks(blocks_K)
        # Only the last block of an array is shorter, so block number k of those read starts at k * block.
        places_N = np.searchsorted(blocks_K, first_N) * block + starts_N % block
        ranges = [values[:0]]
        ranges += [values[i : i + n] for i, n in zip(places_N.tolist(), lengths_N.tolist(), strict=True)]
        return np.concatenate(ranges)

    def read_all(self) -> np.ndarray:
        """Reads the whole array; raises as `read`."""
        return self._read_blocks(np.arange(self.info.blocks))

    def check(self, blocks_K: np.ndarray) -> Iterator[tuple[int, str | None]]:
        """Reads blocks; yields the bytes of each, and what is wrong with it."""
        for content, cause in self._judge(self._array, blocks_K):
            yield content.nbytes, cause

    def _read_blocks(self, blocks_K: np.ndarray) -> np.ndarray:
        """Reads blocks, int64[K] in ascending order, concatenated."""
        edges = np.flatnonzero(np.diff(blocks_K, prepend=-2, append=-2) != 1)  # of runs of consecutive blocks
        starts = self.info.block * blocks_K[edges[:-1]]
        ends = np.minimum(self.info.block * (blocks_K[edges[1:] - 1] + 1), self.info.elements)
        try:
            values = arrays.read_ranges(self._array, self._path, starts.tolist(), (ends - starts).tolist())
        except DataError:  # all are read again, to find out which ones
            return self._read_again(blocks_K)
        wrong_K = hash_blocks(values, self.info.block) != self._hashes(blocks_K)
        if wrong_K.any():
            again = self._read_again(blocks_K[wrong_K])
            values[np.repeat(wrong_K, self.info.block)[: len(values)]] = again
        return values

    def _read_again(self, blocks_K: np.ndarray) -> np.ndarray:
        """Reads blocks that were damaged, one by one and not from a cache; DataError if one still is."""
        contents = []
        uncached = arrays.open_array(self._path, cached=False)
        for block, (content, cause) in zip(blocks_K.tolist(), self._judge(uncached, blocks_K), strict=True):
            if cause is not None:
                raise DataError(f"{self._place(block)} {cause}, twice; {DAMAGED_VERSION_FIX}")
            contents.append(content)
        self._array = arrays.open_array(self._path)  # what caches hold of it is compared with the storage
        blocks = ", ".join(map(str, blocks_K[:_SHOWN])) + (", ..." if len(blocks_K) > _SHOWN else "")
        _log.warning("%s: damaged when it was first read, whole now: block %s", self._path, blocks)
        return np.concatenate(contents)

    def _judge(self, array: arrays.Array, blocks_K: np.ndarray) -> Iterator[tuple[np.ndarray, str | None]]:
        """Reads blocks of the array; yields each one, empty if it cannot be read, and what is wrong with it."""
        starts = self.info.block * blocks_K
        lengths = np.minimum(self.info.block, self.info.elements - starts)
        contents = arrays.read_each(array, self._path, starts.tolist(), lengths.tolist())
        for content, expected in zip(contents, self._hashes(blocks_K).tolist(), strict=True):
            if isinstance(content, DataError):
                is_missing = "NOT_FOUND" in str(content)
                fault = "is missing" if is_missing else "cannot be decoded"
                yield np.empty(0), f"{fault}, expected the hash {_short(expected)}"
                continue
            (found,) = hash_blocks(content, self.info.block).tolist()
            differs = f"has the hash {_short(found)}, expected {_short(expected)}"
            yield content, None if found == expected else differs

    def _hashes(self, blocks_K: np.ndarray) -> np.ndarray:
        """Returns the hashes of blocks, uint64[K]; reads the files of the table that are needed for the first time."""
        table_K, place_K = np.divmod(blocks_K, TABLE_HASHES)
        hashes_K = np.empty(len(blocks_K), np.uint64)
        for number in set(table_K.tolist()):
            if number not in self._tables:
                content = read_file(self._storage, self._manifest, table_name(self.name, number))
                self._tables[number] = np.frombuffer(content, "<u8")
            own_K = table_K == number
            hashes_K[own_K] = self._tables[number][place_K[own_K]]
        return hashes_K

    def _place(self, block: int) -> str:
        """Names the file and the elements of a block."""
        start = block * self.info.block
        end = min(start + self.info.block, self.info.elements)
        return f"{self._path}/{arrays.shard_of(self._array, start)}: block {block} ({self._locate(start, end)})"


def _short(digest: int) -> str:
    return f"{digest:016x}"[:_SHOWN]
