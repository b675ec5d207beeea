"""Writes the arrays of a version: tokens, images, offsets and packings, with their hashes.

Holds one shard of tokens or images in memory, and 24 bytes per document for its offset and length.
"""

import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from jaxinfra.data.packing import PackSpec, pack_documents
from jaxinfra.data.store import arrays
from jaxinfra.data.store.blocks import hash_blocks
from jaxinfra.data.store.layout import (
    HASH_BYTES,
    LENGTHS,
    MASK,
    OFFSETS,
    PACKS,
    ROWS,
    SEGMENTS,
    TOKENS,
    table_sizes,
)
from jaxinfra.data.store.manifest import PackInfo, Split, SplitInfo
from jaxinfra.data.store.store import hash_files

_PACKAGES = ("jaxinfra", "tokenizers", "tensorstore", "numpy", "xxhash")


def common_fields(build: Path) -> dict[str, Any]:
    """Returns the manifest fields that all kinds of stores have; `build` has every file but the manifest."""
    return {
        "index_block": arrays.SMALL_CHUNK,
        "files": hash_files(build),
        "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write_pack(build: Path, split: Split, config: PackSpec, lengths_D: np.ndarray) -> PackInfo:
    """Packs documents of these lengths, ends included, into rows, and writes the ranges of their segments."""
    packs = pack_documents(lengths_D, config.seq_len, by_length=config.by_length)
    offsets_D = np.cumsum(lengths_D) - lengths_D
    segments = np.stack([offsets_D[packs.segment_document] + packs.segment_start, packs.segment_length], axis=1)
    for name, values in ((SEGMENTS, segments), (ROWS, packs.row_offsets)):
        write_array(build / split / PACKS / config.name / name, values)
    return PackInfo(
        rows=packs.num_rows,
        segments=len(packs.segment_length),
        truncated=packs.cut_documents,
        efficiency=packs.efficiency,
    )


def write_array(path: Path, values: np.ndarray) -> None:
    """Writes a whole array in small chunks, because a few elements are read at a time, and the hashes of its blocks."""
    shape, block, shard = values.shape[1:], arrays.SMALL_CHUNK, arrays.SMALL_SHARD
    writer = HashedArrayWriter(path, values.dtype, shape=shape, block=block, shard=shard)
    writer.add(values)
    writer.close()


class HashedArrayWriter:
    """Writes an array in whole shards with a hash of each block; holds one shard in memory."""

    def __init__(self, path: Path, dtype: np.dtype, *, shape: tuple[int, ...], block: int, shard: int):
        """Creates an empty array; elements have `shape`, a hash is of `block` of them, a file has `shard` of them."""
        self._path, self._block, self._shard = path, block, shard
        self._array = arrays.create(str(path), dtype, shape=shape, chunk=block, shard=shard)
        self._waiting, self._num_waiting = [np.empty((0, *shape), dtype)], 0  # the empty array sets shape and type
        self._hashes = [np.empty(0, np.uint64)]

    def add(self, values: np.ndarray) -> None:
        """Appends elements."""
        self._waiting.append(values)
        self._num_waiting += len(values)
        if self._num_waiting >= self._shard:
            self._flush(self._num_waiting // self._shard * self._shard)

    def close(self) -> None:
        """Writes the last elements, and beside the array the hashes of its blocks."""
        self._flush(self._num_waiting)
        content, start = np.concatenate(self._hashes).astype("<u8").tobytes(), 0
        for name, size_bytes in table_sizes(self._path.name, len(content) // HASH_BYTES).items():
            file = self._path.parent / name
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(content[start : start + size_bytes])
            start += size_bytes

    def _flush(self, end: int) -> None:
        values = np.concatenate(self._waiting)
        if end:
            self._array = arrays.append(self._array, str(self._path), values[:end])
            self._hashes.append(hash_blocks(values[:end], self._block))
        self._waiting, self._num_waiting = [values[end:]], len(values) - end


class SplitWriter:
    """Writes the documents of a split to an empty folder; holds about one shard of tokens in memory."""

    def __init__(self, folder: Path, dtype: np.dtype, *, masked: bool):
        self._folder, self._lengths, self._bytes = folder, [np.empty(0, np.int64)], 0
        size = {"block": arrays.CHUNK, "shard": arrays.SHARD}
        self._tokens = HashedArrayWriter(folder / TOKENS, dtype, shape=(), **size)
        self._mask = HashedArrayWriter(folder / MASK, np.dtype(np.uint8), shape=(), **size) if masked else None

    def add(self, tokens_N: np.ndarray, lengths_D: np.ndarray, mask_N: np.ndarray | None, num_bytes: int) -> None:
        """Appends documents with their ends; `mask_N` is 1 for tokens in the loss, `num_bytes` is the text's size."""
        self._tokens.add(tokens_N)
        if self._mask is not None:
            assert mask_N is not None
            self._mask.add(mask_N)
        self._lengths.append(lengths_D)
        self._bytes += num_bytes

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document so far: int64[D]."""
        return np.concatenate(self._lengths)

    def close(self) -> SplitInfo:
        """Writes the rest, and returns what the split holds."""
        lengths_D = self.lengths
        offsets = np.concatenate([[0], np.cumsum(lengths_D)]).astype(np.int64)
        self._tokens.close()
        if self._mask is not None:
            self._mask.close()
        write_array(self._folder / OFFSETS, offsets)
        write_array(self._folder / LENGTHS, lengths_D)
        return SplitInfo(
            documents=len(lengths_D),
            tokens=int(offsets[-1]),
            bytes=self._bytes,
            longest=int(lengths_D.max(initial=0)),
        )
