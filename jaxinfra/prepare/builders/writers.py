"""Writes the arrays of a version: tokens, images, offsets and packings, with their hashes.

Holds one shard of tokens or images in memory, and 24 bytes per document for its offset and length. Shape suffixes: N
tokens and D documents.
"""

import platform
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from jaxinfra.data.packing import PackSpec, pack_documents
from jaxinfra.data.store import arrays, layout
from jaxinfra.data.store.blocks import hash_blocks
from jaxinfra.data.store.manifest import PackInfo, Split, SplitInfo, StoredFile

_PACKAGES = ("jaxinfra", "tokenizers", "tensorstore", "numpy", "xxhash")


def common_fields(build: Path) -> dict[str, Any]:
    """Returns the manifest fields that all kinds of stores have; `build` has every file but the manifest."""
    return {
        "index_block": arrays.SMALL_CHUNK,
        "files": _hash_files(build),
        "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _hash_files(folder: Path) -> dict[str, StoredFile]:
    """Returns length and hash of every file below a folder; no hash for files of blocks."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            digest = None if layout.holds_blocks(name) else xxhash.xxh3_128_hexdigest(path.read_bytes())
            files[name] = StoredFile(bytes=path.stat().st_size, digest=digest)
    return files


def write_pack(build: Path, split: Split, config: PackSpec, lengths_D: np.ndarray) -> PackInfo:
    """Packs documents of these lengths, ends included, into rows, and writes the ranges of their segments."""
    packs = pack_documents(lengths_D, config.seq_len, by_length=config.by_length)
    offsets_D = np.cumsum(lengths_D) - lengths_D
    segments = np.stack([offsets_D[packs.segment_document] + packs.segment_start, packs.segment_length], axis=1)
    for name, values in ((layout.SEGMENTS, segments), (layout.ROWS, packs.row_offsets)):
        write_array(build / split / layout.PACKS / config.name / name, values)
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
        for name, size_bytes in layout.table_sizes(self._path.name, len(content) // layout.HASH_BYTES).items():
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


def write_split(
    folder: Path, dtype: np.dtype, documents: Iterable[Sequence[np.ndarray]], *, masked: bool
) -> tuple[SplitInfo, np.ndarray]:
    """Writes the documents of a split to an empty folder; returns what it holds, and the length of each: int64[D].

    `documents` yields arrays for some documents at a time: lengths_D in tokens, with the end of each; bytes_D of their
    texts; tokens_N; and, if masked, mask_N, which is 1 for tokens in the loss.
    """
    size = {"block": arrays.CHUNK, "shard": arrays.SHARD}
    writers = [HashedArrayWriter(folder / layout.TOKENS, dtype, shape=(), **size)]
    if masked:
        writers.append(HashedArrayWriter(folder / layout.MASK, np.dtype(np.uint8), shape=(), **size))
    length_parts, num_bytes = [np.empty(0, np.int64)], 0
    for lengths_D, bytes_D, *columns in documents:
        for writer, values_N in zip(writers, columns, strict=True):
            writer.add(values_N)
        length_parts.append(lengths_D)
        num_bytes += int(bytes_D.sum())
    for writer in writers:
        writer.close()
    lengths_D = np.concatenate(length_parts)
    offsets = np.concatenate([[0], np.cumsum(lengths_D)]).astype(np.int64)
    write_array(folder / layout.OFFSETS, offsets)
    write_array(folder / layout.LENGTHS, lengths_D)
    longest = int(lengths_D.max(initial=0))
    return SplitInfo(documents=len(lengths_D), tokens=int(offsets[-1]), bytes=num_bytes, longest=longest), lengths_D
