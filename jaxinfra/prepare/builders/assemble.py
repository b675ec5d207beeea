"""From parts to the arrays of a version: every document that is kept, in the order of the source.

Reads parts one after the other and holds one shard of tokens, and some numbers a document (8 bytes each for offsets
and lengths, 16 for its hash; 16 more, and its MinHash, where duplicates are looked for). To begin again after a kill
costs this step, not the tokenising.
"""

import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from jaxinfra.config.text import snake_case
from jaxinfra.data.packing import Pack, pack
from jaxinfra.data.store import arrays
from jaxinfra.data.store.manifest import SPLITS, Counts, PackInfo, Split, SplitInfo
from jaxinfra.data.store.store import BLOCKS, LENGTHS, MASK, OFFSETS, TOKENS, hash_block
from jaxinfra.errors import ConfigError, DataError
from jaxinfra.prepare import parts
from jaxinfra.prepare.builders.overlap import shared
from jaxinfra.prepare.builders.splits import Splits
from jaxinfra.prepare.documents.dedup import Dedup, duplicates
from jaxinfra.prepare.documents.document import Text
from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.recipes.recipe import Recipe
from jaxinfra.prepare.recipes.validation import ByKey, Tail

_SHOWN = 3  # documents that are in both splits
_PACKAGES = ("jaxinfra", "tokenizers", "tensorstore", "numpy", "xxhash")

Keep = Mapping[Split, Sequence[np.ndarray]]
"""By split, which documents of each part stay: bool[D]."""


def made_now() -> dict[str, Any]:
    """Returns the fields of a manifest that say by what it was made, and when."""
    return {
        "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def kept(
    recipe: Recipe, splits: Splits, build: Path, *, group: int = 1, dedup: Dedup | None = None
) -> tuple[Keep, Counts]:
    """Decides which documents stay, and counts what became of the others.

    Of documents that are alike validation ones are kept first, then the first in the source. What is in both splits is
    found among documents as they were read: where duplicates are removed, near ones count as well.

    Args:
        recipe: what to do with what is in both splits.
        splits: of the parts.
        build: gets the list of the records that were skipped.
        group: documents of a record, which stay or go together.
        dedup: which duplicates to remove.

    Raises:
        ConfigError: a split is empty.
        DataError: validation documents are in the training split too, and the recipe allows none; or a part is damaged.
    """
    counts = _counts(splits, build)
    if not counts.records:
        raise _empty(recipe, counts)
    names = ("digest_D2",) if dedup is None else ("exact_D2", "near_DP") if dedup.near else ("exact_D2",)
    sizes_H, heldout = _columns(splits, "heldout", names)
    sizes_T, train = _columns(splits, "train", names)
    size = sum(sizes_H) // group  # validation records come first
    if dedup is None:
        heldout_HK, train_TK = (columns[0].reshape(-1, 2 * group) for columns in (heldout, train))
        overlap_H, keep_G = shared(heldout_HK, train_TK), np.ones(size + len(train_TK), bool)
        if recipe.on_overlap == "drop":
            keep_G[size:] = ~shared(train_TK, heldout_HK)
    else:
        heldout, train = ([rows[::group] for rows in columns] for columns in (heldout, train))
        keep_G = ~_repeats(dedup, heldout, train)
        overlap_H = np.zeros(size, bool)
        once = [rows[keep_G[:size]] for rows in heldout]
        overlap_H[keep_G[:size]] = _repeats(dedup, train, once)[len(train[0]) :]
    if recipe.on_overlap == "fail" and (both := np.flatnonzero(overlap_H)).size:
        where_H = _columns(splits, "heldout", ("where_D",))[1][0][::group]
        some = ", ".join(where_H[both[:_SHOWN]].tolist()) + (", ..." if len(both) > _SHOWN else "")
        raise DataError(
            f"on_overlap=fail: {len(both):,} of {size:,} validation documents are in the training split too ({some}); "
            "mend the sources, or leave them out of training by on_overlap=drop"
        )
    lost = group * int((~keep_G).sum())
    counts = replace(
        counts,
        duplicates=lost if dedup is not None else 0,
        overlap=group * int(overlap_H.sum()),
        overlap_dropped=lost if dedup is None else 0,
    )
    keep_D = np.split(np.repeat(keep_G, group), np.cumsum([*sizes_H, *sizes_T])[:-1])
    keep: Keep = {"heldout": keep_D[: len(sizes_H)], "train": keep_D[len(sizes_H) :]}
    _check_splits(recipe, {split: sum(int(each.sum()) for each in keep[split]) for split in SPLITS}, counts)
    return keep, counts


def _counts(splits: Splits, build: Path) -> Counts:
    """Counts records; `skipped.jsonl` in `build` lists those that could not be used."""
    records = skipped = 0
    filtered = Counter[str]()
    for number in splits.numbers:
        note = parts.note(splits.folder, number)
        records, skipped = records + note.records, skipped + len(note.skipped)
        filtered.update(note.filtered)
        if note.skipped:
            with (build / "skipped.jsonl").open("a", encoding="utf-8") as file:
                for where, cause in note.skipped:
                    file.write(json.dumps({"where": where, "cause": cause}, ensure_ascii=False) + "\n")
    return Counts(records=records, skipped=skipped, filtered=dict(sorted(filtered.items())))


def _empty(recipe: Recipe, counts: Counts) -> ConfigError:
    return ConfigError(
        f"store={recipe.store}: the corpus is empty: {_left_out(counts)}; mend the source or the filters"
    )


def _left_out(counts: Counts) -> str:
    return f"{counts.records} records read, {counts.skipped} skipped, {sum(counts.filtered.values())} filtered"


def _check_splits(recipe: Recipe, found: Mapping[Split, int], counts: Counts) -> None:
    """Refuses sources that leave nothing to train on, or nothing to validate with; `found` is left of each split."""
    if all(found.values()):
        return
    validation, left = recipe.validation, sum(found.values())
    if not left:
        raise _empty(recipe, counts)
    if not isinstance(validation, ByKey | Tail):
        empty = "validation" if found["train"] else "source"
        raise ConfigError(
            f"{empty}: gives nothing ({_left_out(counts)}; the {left} that are left are of the other source); mend "
            f"{empty} or the filters, or use validation=by_key"
        )
    what = "none is left to train on" if found["heldout"] else "none is held out"
    cuttable = isinstance(recipe, Corpus) and isinstance(validation, ByKey) and isinstance(recipe.form, Text)
    fix = "or use validation=tail, which cuts the text of a single document" if cuttable else "or more records"
    raise ConfigError(
        f"validation={snake_case(type(validation))} validation.fraction={validation.fraction}: of {left} "
        f"records {what}; use another fraction, {fix}"
    )


def _columns(splits: Splits, split: Split, names: Sequence[str]) -> tuple[list[int], list[np.ndarray]]:
    """Reads arrays of all parts: how many documents each part has, and the arrays, each as one."""
    found = list(splits.read(split, *names))
    return [len(rows[0]) for rows in found], [np.concatenate(column) for column in zip(*found, strict=True)]


def _repeats(dedup: Dedup, earlier: Sequence[np.ndarray], later: Sequence[np.ndarray]) -> np.ndarray:
    """`duplicates` of documents after others, of the exact signatures and the near ones of both."""
    exact_N2, *near = (np.concatenate(both) for both in zip(earlier, later, strict=True))
    return duplicates(dedup, exact_N2, near[0] if near else None)


def write_pack(build: Path, split: Split, wanted: Pack, lengths_D: np.ndarray) -> PackInfo:
    """Packs documents of so many tokens, with their ends, into rows, and writes where their pieces are."""
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
        """Begins an empty array in a new folder, of elements of this shape; () is that of numbers.

        A block of elements is read and hashed together; a shard of them, some blocks, is a file.
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
        """Appends documents, each with its end; `mask_N` says which tokens are learned, `n_bytes` are of their text."""
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
