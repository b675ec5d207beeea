"""Reads the arrays of a version block by block, and compares each block with its hash.

The CRC of a chunk (see `arrays`) says that the chunk is what was once written there. It says nothing about a chunk or
file that is whole by itself, but stale, swapped with another, or of another store. So each block has a hash in a table
beside its array, each file of the table one in the manifest, and the fingerprint of the version covers those.

A block is a chunk of the array, which is read whole anyway. A block that does not fit its hash is read once more, past
all caches, since a bucket or a cache may fail once.

Shape suffixes: N ranges, K blocks that are read together.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import xxhash

from jaxinfra.data.store import arrays
from jaxinfra.data.store.layout import DESCRIPTION, TABLE_HASHES, table_name
from jaxinfra.data.store.manifest import Manifest
from jaxinfra.errors import DataError, StorageError
from jaxinfra.storage.errors import DAMAGED_VERSION_FIX, call_storage
from jaxinfra.storage.objects import ObjectStore

_SHOWN = 8  # digits of a hash in messages
_MAX_NAMED = 8  # blocks in a message

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
    for read in (storage.read, storage.read_or_none):  # the second one does not raise, so that `found` is reported
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
    """An array of a version, open for reading; safe to use from many threads."""

    def __init__(self, storage: ObjectStore, manifest: Manifest, name: str, locate: Callable[[int, int], str]):
        """Opens the array with this name in the version, such as `train/tokens`.

        `locate(first, end)` describes a range of elements for messages, such as the documents that it is part of.
        Raises DataError if the description of the array is damaged or missing.
        """
        self.info, self._name, self._locate = manifest.arrays[name], name, locate
        self._storage, self._manifest, self._path = storage, manifest, storage.url_of(name)
        self._hashes = np.empty(self.info.blocks, np.uint64)  # takes memory only where it is filled
        self._tables: set[int] = set()  # files of hashes that were read
        read_file(storage, manifest, f"{name}/{DESCRIPTION}")
        self._array = arrays.open_array(self._path)
        if self._array.shape[0] != self.info.elements:
            raise DataError(
                f"{self._path}: has {self._array.shape[0]} elements, expected {self.info.elements}; "
                f"{DAMAGED_VERSION_FIX}"
            )

    def read(self, starts_N: np.ndarray, lengths_N: np.ndarray) -> np.ndarray:
        """Reads the ranges from each start on, concatenated.

        DataError if a range is outside the array, or a block of it is damaged; StorageError if it cannot be read.
        """
        numbers = self._blocks_of(starts_N, lengths_N)
        return np.concatenate(self._cut(self._read_blocks(numbers), numbers, starts_N, lengths_N))

    def _blocks_of(self, starts_N: np.ndarray, lengths_N: np.ndarray) -> list[int]:
        """Returns the numbers of the blocks that have the ranges, ascending; raises as `read`."""
        block, starts, lengths = self.info.block, starts_N.tolist(), lengths_N.tolist()
        # Ranges in the blocks 2 to 3 and 3 to 5 need the blocks 2, 3, 4 and 5, each once. For a batch of some dozen
        # ranges, this is faster in Python than in NumPy.
        needed: set[int] = set()
        for start, length in zip(starts, lengths, strict=True):
            if start < 0 or start + length > self.info.elements:
                raise DataError(
                    f"{self._path}: elements {start} to {start + length} are outside its {self.info.elements}; "
                    f"{DAMAGED_VERSION_FIX}"
                )
            needed.update(range(start // block, -(-(start + length) // block)))  # the end is rounded up
        return sorted(needed)

    def _cut(
        self, values: np.ndarray, numbers: Sequence[int], starts_N: np.ndarray, lengths_N: np.ndarray
    ) -> list[np.ndarray]:
        """Returns the ranges, of the values of these blocks."""
        block = self.info.block
        # Only the last block of an array is shorter, so block number k of those read starts at k * block.
        offset = {number: (k - number) * block for k, number in enumerate(numbers)}
        ranges = [values[:0]]
        for start, length in zip(starts_N.tolist(), lengths_N.tolist(), strict=True):
            if length:
                at = start + offset[start // block]
                ranges.append(values[at : at + length])
        return ranges

    def read_all(self) -> np.ndarray:
        """Reads the whole array; raises as `read`."""
        return self._read_blocks(range(self.info.blocks))

    def _read_blocks(self, numbers: Sequence[int]) -> np.ndarray:
        """Reads blocks, in ascending order, concatenated."""
        block = self.info.block
        try:
            values = arrays.read_ranges(self._array, self._path, *self._spans(numbers))
        except DataError:  # all are read again, to find out which ones
            return self._read_again(numbers)
        wrong_K = hash_blocks(values, block) != self._hashes_of(numbers)
        if wrong_K.any():
            again = self._read_again([numbers[k] for k in np.flatnonzero(wrong_K).tolist()])
            values[np.repeat(wrong_K, block)[: len(values)]] = again
        return values

    def _spans(self, numbers: Sequence[int]) -> tuple[list[int], list[int]]:
        """Returns starts and lengths of what blocks have, with consecutive ones as one: 2, 3 and 5 are 2 to 3 and 5."""
        block, wanted = self.info.block, set(numbers)
        starts = [block * number for number in numbers if number - 1 not in wanted]
        ends = [min(block * (number + 1), self.info.elements) for number in numbers if number + 1 not in wanted]
        return starts, [end - start for start, end in zip(starts, ends, strict=True)]

    def _read_again(self, numbers: Sequence[int]) -> np.ndarray:
        """Reads blocks that were damaged, one by one and not from a cache; DataError if one still is."""
        contents = []
        for number, (content, cause) in zip(numbers, self.check(numbers, cached=False), strict=True):
            if cause is not None:
                start = number * self.info.block
                end = min(start + self.info.block, self.info.elements)
                place = f"{self._path}/{arrays.shard_of(self._array, start)}: block {number}"
                raise DataError(f"{place} ({self._locate(start, end)}) {cause}, twice; {DAMAGED_VERSION_FIX}")
            contents.append(content)
        self._array = arrays.open_array(self._path)  # what caches hold of it is compared with the storage
        named = ", ".join(map(str, numbers[:_MAX_NAMED])) + (", ..." if len(numbers) > _MAX_NAMED else "")
        _log.warning("%s: damaged when it was first read, whole now: block %s", self._path, named)
        return np.concatenate(contents)

    def check(self, numbers: Sequence[int], *, cached: bool = True) -> Iterator[tuple[np.ndarray, str | None]]:
        """Reads blocks; yields each one, empty if it cannot be read, and what is wrong with it."""
        array = self._array if cached else arrays.open_array(self._path, cached=False)
        block, expected_hashes = self.info.block, self._hashes_of(numbers).tolist()
        starts = [block * number for number in numbers]
        futures = [array[start : min(start + block, self.info.elements)].read() for start in starts]
        for future, expected in zip(futures, expected_hashes, strict=True):
            try:
                content = call_storage(self._path, future.result)
            except DataError as error:
                fault = "is missing" if "NOT_FOUND" in str(error) else "cannot be decoded"
                yield np.empty(0), f"{fault}, expected the hash {_short(expected)}"
                continue
            (found,) = hash_blocks(content, block).tolist()
            differs = f"has the hash {_short(found)}, expected {_short(expected)}"
            yield content, None if found == expected else differs

    def _hashes_of(self, numbers: Sequence[int]) -> np.ndarray:
        """Returns the hashes of blocks, uint64; reads the files of the table that are needed for the first time."""
        # The k-th file has the hashes of the blocks from k * TABLE_HASHES on.
        for table in {number // TABLE_HASHES for number in numbers} - self._tables:
            content = read_file(self._storage, self._manifest, table_name(self._name, table))
            hashes = np.frombuffer(content, "<u8")
            self._hashes[table * TABLE_HASHES :][: len(hashes)] = hashes
            self._tables.add(table)
        return self._hashes[numbers]


def read_together(parts: Sequence[tuple[CheckedArray, np.ndarray, np.ndarray]]) -> np.ndarray:
    """Reads ranges (starts and lengths) of several arrays of one type, concatenated; raises as `CheckedArray.read`.

    One request for all of them costs little more than one for a single array. After a failure each is read by itself.
    """
    plans = [(array, array._blocks_of(starts_N, lengths_N)) for array, starts_N, lengths_N in parts]
    spans = [(array._array, *array._spans(numbers)) for array, numbers in plans]
    try:
        values = arrays.read_several(spans, plans[0][0]._path)
        ranges, end = list[np.ndarray](), 0
        for (array, numbers), (_, starts_N, lengths_N), (_, _, lengths) in zip(plans, parts, spans, strict=True):
            own, end = values[end : end + sum(lengths)], end + sum(lengths)
            if (hash_blocks(own, array.info.block) != array._hashes_of(numbers)).any():
                raise DataError(f"{array._path}: damaged")
            ranges += array._cut(own, numbers, starts_N, lengths_N)
        return np.concatenate(ranges)
    except (DataError, StorageError):  # tells of which array, if it is so again
        return np.concatenate([array.read(starts_N, lengths_N) for array, starts_N, lengths_N in parts])


def _short(digest: int) -> str:
    """Returns the start of a 64-bit hash, for messages."""
    return f"{digest:016x}"[:_SHOWN]
