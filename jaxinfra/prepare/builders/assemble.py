"""From parts to the arrays of a version: every document that is kept, in the order of the source.

Reads parts one after the other and holds one shard of tokens, and some numbers a document (8 bytes each for offsets
and lengths; 16 more, and its MinHash, where duplicates are looked for). To begin again after a kill costs this step,
not the tokenising.
"""

import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from jaxinfra.data.packing import Pack, pack
from jaxinfra.data.store import arrays
from jaxinfra.data.store.manifest import Counts, PackInfo, Split, SplitInfo
from jaxinfra.data.store.store import BLOCKS, LENGTHS, MASK, OFFSETS, TOKENS, hash_block
from jaxinfra.errors import ConfigError
from jaxinfra.prepare.documents.dedup import duplicates
from jaxinfra.prepare.parts import Open
from jaxinfra.prepare.recipes.corpus import Corpus

_PACKAGES = ("jaxinfra", "tokenizers", "tensorstore", "numpy", "xxhash")

Keep = Mapping[tuple[Split, int], np.ndarray]
"""By split and part, which of its documents stay: bool[D]."""


def counts(folder: Path, numbers: Sequence[int], build: Path) -> Counts:
    """What became of the records of parts, but for duplicates; `skipped.jsonl` in `build` lists the skipped ones."""
    records = skipped = 0
    filtered = Counter[str]()
    for number in numbers:
        with Open(folder, number) as part:
            note = part.note
        records, skipped = records + note.records, skipped + len(note.skipped)
        filtered.update(note.filtered)
        if note.skipped:
            with (build / "skipped.jsonl").open("a", encoding="utf-8") as file:
                for where, cause in note.skipped:
                    file.write(json.dumps({"where": where, "cause": cause}, ensure_ascii=False) + "\n")
    return Counts(records=records, skipped=skipped, filtered=dict(sorted(filtered.items())))


def check_splits(store: str, found: Mapping[Split, int], counts: Counts, heldout_fraction: float) -> None:
    """Refuses a source that leaves nothing to train on, or nothing to look at.

    Args:
        store: for the message.
        found: documents or images of each split.
        counts: of the records.
        heldout_fraction: of the recipe.

    Raises:
        ConfigError: a split is empty.
    """
    total = sum(found.values())
    if not total:
        raise ConfigError(
            f"store={store}: the corpus is empty: {counts.records} records read, {counts.skipped} skipped, "
            f"{sum(counts.filtered.values())} filtered; mend the source or the filters"
        )
    missing: dict[Split, str] = {"train": "none is left to train on", "heldout": "none is held out"}
    for split, what in missing.items():
        if not found[split]:
            raise ConfigError(
                f"heldout_fraction={heldout_fraction}: of {total} records {what}; use another fraction, or cut the "
                "source into more records"
            )


def made_now() -> dict[str, Any]:
    """The fields of a manifest that say by what it was made, and when."""
    return {
        "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def kept(corpus: Corpus, folder: Path, numbers: Sequence[int]) -> Keep:
    """Which documents stay: of those that are alike, held-out ones first, then the first in the source."""
    keep: dict[tuple[Split, int], np.ndarray] = {}
    exact, near = [], []
    places: list[tuple[Split, int, int]] = []
    group = corpus.form.group
    for split in ("heldout", "train"):
        for number in numbers:
            with Open(folder, number) as part:
                count = len(part.read(split, "lengths_D"))
                if corpus.dedup is not None:
                    exact.append(part.read(split, "exact_D2")[::group])
                    near += [part.read(split, "near_DP")[::group]] if corpus.dedup.near else []
            keep[split, number] = np.ones(count, bool)
            places.append((split, number, count))
    if corpus.dedup is None:
        return keep
    repeats = duplicates(corpus.dedup, np.concatenate(exact), np.concatenate(near) if near else None)
    done = 0
    for split, number, count in places:
        keep[split, number] = ~np.repeat(repeats[done : done + count // group], group)
        done += count // group
    return keep


def copy(folder: Path, numbers: Sequence[int], split: Split, keep: Keep, writer: "SplitWriter") -> None:
    """Appends the documents of parts that stay to a split.

    Args:
        folder: of the parts.
        numbers: those to take, in order.
        split: which.
        keep: which of its documents stay.
        writer: of the split.
    """
    for number in numbers:
        with Open(folder, number) as part:
            lengths_D, keep_D = part.read(split, "lengths_D"), keep[split, number]
            mask_N = part.read(split, "mask_N") if writer.masked else None
            tokens_N, bytes_D = part.read(split, "tokens_N"), part.read(split, "bytes_D")
        if not keep_D.all():
            keep_N = np.repeat(keep_D, lengths_D)
            tokens_N, mask_N = tokens_N[keep_N], None if mask_N is None else mask_N[keep_N]
            lengths_D, bytes_D = lengths_D[keep_D], bytes_D[keep_D]
        writer.add(tokens_N, lengths_D, mask_N, int(bytes_D.sum()))


def write_pack(build: Path, split: Split, wanted: Pack, lengths_D: np.ndarray) -> PackInfo:
    """Packs the documents of a split into rows, and writes where their pieces are.

    Args:
        build: the folder of the version.
        split: which.
        wanted: how.
        lengths_D: tokens of each document, with its end.
    """
    packs = pack(lengths_D, wanted.seq_len, by_length=wanted.by_length)
    offsets_D = np.cumsum(lengths_D) - lengths_D
    found = {
        "pieces": np.stack([offsets_D[packs.piece_document] + packs.piece_skip, packs.piece_length], axis=1),
        "rows": packs.row_offsets,
    }
    digest = xxhash.xxh3_128()
    for name, values in found.items():
        write_array(build / split / "packs" / wanted.name / name, values)
        digest.update(hash_block(values).to_bytes(8, "little"))
    return PackInfo(
        rows=packs.rows,
        pieces=len(packs.piece_length),
        truncated=packs.cut_documents,
        efficiency=packs.efficiency,
        digest=digest.hexdigest(),
    )


def write_array(path: Path, values: np.ndarray) -> None:
    """Writes a whole array, of which few elements may be read at a time."""
    fill, shape, few, shard = int(np.iinfo(values.dtype).max), values.shape[1:], arrays.FEW, arrays.SHARD_OF_FEW
    array = arrays.create(str(path), values.dtype, fill, shape=shape, chunk=few, shard=shard)
    arrays.append(array, str(path), values)


class Blocks:
    """An array that grows by whole shards, and the hash of each of its blocks; holds one shard in memory."""

    def __init__(self, path: Path, dtype: np.dtype, *, shape: tuple[int, ...] = (), block: int, shard: int):
        """Begins an empty array in a new folder.

        Args:
            path: of the folder.
            dtype: of the elements.
            shape: of an element; () for numbers.
            block: elements that are read and hashed together.
            shard: elements of a file, a multiple of `block`.
        """
        self._path, self._block, self._shard = path, block, shard
        fill = int(np.iinfo(dtype).max)
        self._array = arrays.create(str(path), dtype, fill, shape=shape, chunk=block, shard=shard)
        self._waiting, self._count = [np.empty((0, *shape), dtype)], 0
        self._hashes: list[int] = []

    def add(self, values: np.ndarray) -> None:
        """Appends elements."""
        self._waiting.append(values)
        self._count += len(values)
        if self._count >= self._shard:
            self._flush(self._count // self._shard * self._shard)

    def close(self) -> str:
        """Writes what is left, and the hashes; returns the digest of them."""
        self._flush(self._count)
        hashes = np.array(self._hashes, np.uint64)
        write_array(self._path.with_name(self._path.name + BLOCKS), hashes)
        return xxhash.xxh3_128_hexdigest(hashes.astype("<u8").tobytes())

    def _flush(self, cut: int) -> None:
        values = np.concatenate(self._waiting)
        if cut:
            self._array = arrays.append(self._array, str(self._path), values[:cut])
            self._hashes += [hash_block(values[at : min(at + self._block, cut)]) for at in range(0, cut, self._block)]
        self._waiting, self._count = [values[cut:]], len(values) - cut


class SplitWriter:
    """Appends documents to a split in an empty folder; holds about one shard of tokens in memory."""

    def __init__(self, folder: Path, dtype: np.dtype, *, masked: bool):
        self._folder, self.masked = folder, masked
        block, shard = arrays.CHUNK, arrays.SHARD
        self._tokens = Blocks(folder / TOKENS, dtype, block=block, shard=shard)
        self._mask = Blocks(folder / MASK, np.dtype(np.uint8), block=block, shard=shard) if masked else None
        self._lengths = [np.empty(0, np.int64)]
        self._bytes = 0

    def add(self, tokens_N: np.ndarray, lengths_D: np.ndarray, mask_N: np.ndarray | None, n_bytes: int) -> None:
        """Appends documents.

        Args:
            tokens_N: of all of them, each with its end.
            lengths_D: tokens of each.
            mask_N: which tokens are learned; None where there is no mask.
            n_bytes: bytes of text that they stand for.
        """
        self._tokens.add(tokens_N)
        if self._mask is not None and mask_N is not None:
            self._mask.add(mask_N)
        self._lengths.append(lengths_D)
        self._bytes += n_bytes

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document so far: int64[D]."""
        return np.concatenate(self._lengths)

    def close(self) -> SplitInfo:
        """Writes what is left and says what the split holds."""
        lengths_D = self.lengths
        offsets = np.concatenate([[0], np.cumsum(lengths_D)]).astype(np.int64)
        digests = [self._tokens.close()] + ([self._mask.close()] if self._mask is not None else [])
        for name, values in ((OFFSETS, offsets), (LENGTHS, lengths_D)):
            write_array(self._folder / name, values)
            digests.append(xxhash.xxh3_128_hexdigest(values.astype("<i8").tobytes()))
        return SplitInfo(
            documents=len(lengths_D),
            tokens=int(offsets[-1]),
            bytes=self._bytes,
            longest=int(lengths_D.max(initial=0)),
            digest=xxhash.xxh3_128_hexdigest("".join(digests).encode()),
        )
