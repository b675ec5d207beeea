"""From parts to the arrays of a version: every document that is kept, in the order of the source.

Reads parts one after the other and holds one shard of tokens, and some numbers a document (8 bytes each for offsets
and lengths, 16 for its hash; 16 more, and its MinHash, where duplicates are looked for). To begin again after a kill
costs this step, not the tokenising.
"""

import json
import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from jaxinfra.config.text import snake_case
from jaxinfra.data.packing import PackSpec, pack_documents
from jaxinfra.data.store import arrays
from jaxinfra.data.store.manifest import SPLITS, Counts, PackInfo, Split, SplitInfo
from jaxinfra.data.store.store import BLOCKS, LENGTHS, MASK, OFFSETS, TOKENS, hash_block
from jaxinfra.data.tokenizer import Tokenizer
from jaxinfra.errors import ConfigError, DataError
from jaxinfra.prepare import parts
from jaxinfra.prepare.documents.dedup import Dedup, Signer, duplicates
from jaxinfra.prepare.documents.document import Text
from jaxinfra.prepare.documents.shingles import digest_of_bytes
from jaxinfra.prepare.recipes import Recipe
from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.recipes.validation import ByKey, Tail

_WINDOW = 16  # tokens, of which the last ones show whether a character is cut
_SHOWN = 3  # documents that are in both splits
_PACKAGES = ("jaxinfra", "tokenizers", "tensorstore", "numpy", "xxhash")

type _Arrays = Mapping[str, np.ndarray]
Keep = Mapping[Split, Sequence[np.ndarray]]
"""By split, which documents of each part stay: bool[D]."""


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Parts in their order; `cut` is where each split is, a part or its arrays, if all parts hold training data."""

    folder: Path
    numbers: Sequence[int]
    cut: Mapping[Split, Sequence[int | _Arrays]] | None = None

    def read(self, split: Split, *names: str) -> Iterator[tuple[np.ndarray, ...]]:
        """Yields arrays of a split, for each part; DataError where one is damaged."""
        for place in self.numbers if self.cut is None else self.cut[split]:
            if isinstance(place, int):
                with parts.opened(self.folder, place) as part:
                    yield tuple(part[f"{split if self.cut is None else 'train'}.{name}"] for name in names)
            else:
                yield tuple(place[name] for name in names)

    def kept(self, split: Split, keep: Keep, *names: str) -> Iterator[tuple[np.ndarray, ...]]:
        """Yields arrays of the documents that stay, for each part; `*_N` have `lengths_D` elements a document."""
        for found, keep_D in zip(self.read(split, *names), keep[split], strict=True):
            if not keep_D.all():
                keep_N = np.repeat(keep_D, dict(zip(names, found, strict=True)).get("lengths_D", 1))
                stay = (keep_N if name.endswith("_N") else keep_D for name in names)
                found = tuple(values[each] for values, each in zip(found, stay, strict=True))
            yield found


def made_now() -> dict[str, Any]:
    """Returns the fields of a manifest that say by what it was made, and when."""
    return {
        "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def kept(recipe: Recipe, splits: Splits, build: Path) -> tuple[Keep, Counts]:
    """Decides which documents stay, and counts what became of the others; `build` gets the list of bad records.

    Of documents that are alike validation ones are kept first, then the first in the source. What is in both splits is
    found among documents as they were read: where duplicates are removed, near ones count as well. Documents of one
    record stay or go together.

    Raises:
        ConfigError: a split is empty.
        DataError: validation documents are in the training split too, and the recipe allows none; or a part is damaged.
    """
    group, dedup = (recipe.form.group, recipe.dedup) if isinstance(recipe, Corpus) else (1, None)
    counts = _counts(splits, build)
    if not counts.records:
        raise _no_split(recipe, dict.fromkeys(SPLITS, 0), counts)
    names = ("digest_D2",) if dedup is None else ("exact_D2", "near_DP") if dedup.near else ("exact_D2",)
    sizes_H, validation = _columns(splits, "validation", names)
    sizes_T, train = _columns(splits, "train", names)
    size = sum(sizes_H) // group  # validation records come first
    if dedup is None:
        validation_HK, train_TK = (columns[0].reshape(-1, 2 * group) for columns in (validation, train))
        overlap_H, keep_G = _shared(validation_HK, train_TK), np.ones(size + len(train_TK), bool)
        if recipe.on_overlap == "drop":
            keep_G[size:] = ~_shared(train_TK, validation_HK)
    else:
        validation, train = ([rows[::group] for rows in columns] for columns in (validation, train))
        keep_G = ~_repeats(dedup, validation, train)
        overlap_H = np.zeros(size, bool)
        once = [rows[keep_G[:size]] for rows in validation]
        overlap_H[keep_G[:size]] = _repeats(dedup, train, once)[len(train[0]) :]
    if recipe.on_overlap == "fail" and (both := np.flatnonzero(overlap_H)).size:
        where_H = _columns(splits, "validation", ("where_D",))[1][0][::group]
        some = ", ".join(where_H[both[:_SHOWN]].tolist()) + (", ..." if len(both) > _SHOWN else "")
        raise DataError(
            f"on_overlap=fail: {len(both):,} of {size:,} validation documents are in the training split too ({some}); "
            "mend the sources, or leave them out of training by on_overlap=drop"
        )
    lost = {"overlap_dropped" if dedup is None else "duplicates": group * int((~keep_G).sum())}
    counts = replace(counts, overlap=group * int(overlap_H.sum()), **lost)
    keep_D = np.split(np.repeat(keep_G, group), np.cumsum([*sizes_H, *sizes_T])[:-1])
    keep: Keep = {"validation": keep_D[: len(sizes_H)], "train": keep_D[len(sizes_H) :]}
    left: dict[Split, int] = {split: sum(int(each.sum()) for each in keep[split]) for split in SPLITS}
    if not all(left.values()):
        raise _no_split(recipe, left, counts)
    return keep, counts


def _counts(splits: Splits, build: Path) -> Counts:
    """Counts records; `skipped.jsonl` in `build` lists those that could not be used."""
    notes = []
    for number in splits.numbers:
        notes.append(parts.note(splits.folder, number))
    skipped = [{"where": where, "cause": cause} for note in notes for where, cause in note.skipped]
    if skipped:
        lines = (json.dumps(each, ensure_ascii=False) + "\n" for each in skipped)
        (build / "skipped.jsonl").write_text("".join(lines), encoding="utf-8")
    filtered = sum((Counter(note.filtered) for note in notes), Counter[str]())
    records = sum(note.records for note in notes)
    return Counts(records=records, skipped=len(skipped), filtered=dict(sorted(filtered.items())))


def _no_split(recipe: Recipe, found: Mapping[Split, int], counts: Counts) -> ConfigError:
    """Returns the error for sources that leave nothing to train on, or to validate with; `found` is left of each."""
    validation, left = recipe.validation, sum(found.values())
    lost = f"{counts.records} records read, {counts.skipped} skipped, {sum(counts.filtered.values())} filtered"
    if not left:
        return ConfigError(f"store={recipe.store}: the corpus is empty: {lost}; mend the source or the filters")
    if not isinstance(validation, ByKey | Tail):
        empty = "validation" if found["train"] else "source"
        return ConfigError(
            f"{empty}: gives nothing ({lost}; the {left} that are left are of the other source); mend {empty} or the "
            "filters, or use validation=by_key"
        )
    what = "none is left to train on" if found["validation"] else "none is validation data"
    cuttable = isinstance(recipe, Corpus) and isinstance(validation, ByKey) and isinstance(recipe.form, Text)
    fix = "or use validation=tail, which cuts the text of a single document" if cuttable else "or more records"
    return ConfigError(
        f"validation={snake_case(type(validation))} validation.fraction={validation.fraction}: of {left} "
        f"records {what}; use another fraction, {fix}"
    )


def _columns(splits: Splits, split: Split, names: Sequence[str]) -> tuple[list[int], list[np.ndarray]]:
    """Reads arrays of all parts: how many documents each part has, and the arrays, each as one."""
    found = list(splits.read(split, *names))
    return [len(rows[0]) for rows in found], [np.concatenate(column) for column in zip(*found, strict=True)]


def _shared(ours_NK: np.ndarray, theirs_MK: np.ndarray) -> np.ndarray:
    """Tells which rows of `ours` are rows of `theirs` too: bool[N]."""
    found_N = np.isin(ours_NK[:, 0], theirs_MK[:, 0])
    wanted = set(map(tuple, theirs_MK[np.isin(theirs_MK[:, 0], ours_NK[found_N, 0])].tolist()))
    found_N[found_N] = [tuple(row) in wanted for row in ours_NK[found_N].tolist()]
    return found_N


def _repeats(dedup: Dedup, earlier: Sequence[np.ndarray], later: Sequence[np.ndarray]) -> np.ndarray:
    """`duplicates` of documents after others, of the exact signatures and the near ones of both."""
    exact_N2, *near = (np.concatenate(both) for both in zip(earlier, later, strict=True))
    return duplicates(dedup, exact_N2, near[0] if near else None)


def with_tail(splits: Splits, corpus: Corpus, validation: Tail, tokenizer: Tokenizer) -> Splits:
    """Finds where the tail of the text begins, of parts that are all training data so far; raises as `Splits.read`.

    The document that it begins in is cut between two tokens where all of it is learned; other records stay whole.
    """
    form = corpus.form
    sizes = [bytes_D for (bytes_D,) in splits.read("train", "bytes_D")]
    ends = np.cumsum([int(bytes_D.sum()) for bytes_D in sizes])
    left = int(ends[-1] * (1 - validation.fraction))
    index = min(int(np.searchsorted(ends, left, side="right")), len(sizes) - 1)
    left -= int(ends[index - 1]) if index else 0
    document = int(np.searchsorted(np.cumsum(sizes[index]), left, side="right"))
    left -= int(sizes[index][:document].sum())
    with parts.opened(splits.folder, splits.numbers[index]) as part:
        arrays = {key.removeprefix("train."): part[key] for key in part if key.startswith("train.")}
    if not form.masked and form.group == 1 and document < len(sizes[index]):
        share = left / int(sizes[index][document])
        if halved := _halved(arrays, document, share, tokenizer, corpus.dedup):
            arrays, document = halved, document + 1
    document = document // form.group * form.group
    if not document and not any(map(len, sizes[:index])):
        document = form.group  # the first record is for training
    token = int(arrays["lengths_D"][:document].sum())
    at = {name: token if name.endswith("_N") else document for name in arrays}
    train = {name: values[: at[name]] for name, values in arrays.items()}
    tail = {name: values[at[name] :] for name, values in arrays.items()}
    before, after = splits.numbers[:index], splits.numbers[index + 1 :]
    return replace(splits, cut={"train": [*before, train], "validation": [tail, *after]})


def _halved(arrays: _Arrays, document: int, share: float, tokenizer: Tokenizer, dedup: Dedup | None) -> _Arrays | None:
    """Makes two documents of one, cut before a token that begins a character; None where no such token is near."""
    start = int(arrays["lengths_D"][:document].sum())
    tokens_N = arrays["tokens_N"][start : start + int(arrays["lengths_D"][document])]
    ids, at = tokens_N[:-1].tolist(), int((len(tokens_N) - 1) * share)
    while 0 < at < len(ids) and tokenizer.decode(ids[max(0, at - _WINDOW) : at]).endswith("\ufffd"):
        at += 1
    if not 0 < at < len(ids):
        return None
    halves = np.append(tokens_N[:at], tokens_N[-1]), tokens_N[at:]
    texts = tokenizer.decode(ids[:at]), tokenizer.decode(ids[at:])
    first_bytes = len(texts[0].encode())
    rows: dict[str, Any] = {
        "lengths_D": [len(half_N) for half_N in halves],
        "bytes_D": [first_bytes, int(arrays["bytes_D"][document]) - first_bytes],
        "digest_D2": [digest_of_bytes(half_N.tobytes()) for half_N in halves],
    }
    if dedup is not None:
        rows["exact_D2"], rows["near_DP"] = zip(*map(Signer(dedup), texts), strict=True)
    found = {"tokens_N": np.insert(arrays["tokens_N"], start + at, tokens_N[-1])}
    for name, values in arrays.items():
        if name != "tokens_N":
            both = np.array(rows[name], values.dtype) if name in rows else values[[document] * 2]
            found[name] = np.concatenate([values[:document], both, values[document + 1 :]])
    return found


def write_pack(build: Path, split: Split, wanted: PackSpec, lengths_D: np.ndarray) -> PackInfo:
    """Packs documents into rows, and writes where their segments start; `lengths_D` count tokens with the end."""
    packs = pack_documents(lengths_D, wanted.seq_len, by_length=wanted.by_length)
    offsets_D = np.cumsum(lengths_D) - lengths_D
    found = {
        "segments": np.stack([offsets_D[packs.segment_document] + packs.segment_start, packs.segment_length], axis=1),
        "rows": packs.row_offsets,
    }
    digest = xxhash.xxh3_128()
    for name, values in found.items():
        write_array(build / split / "packs" / wanted.name / name, values)
        digest.update(hash_block(values).to_bytes(8, "little"))
    return PackInfo(
        rows=packs.rows,
        segments=len(packs.segment_length),
        truncated=packs.cut_documents,
        efficiency=packs.efficiency,
        digest=digest.hexdigest(),
    )


def write_array(path: Path, values: np.ndarray) -> str:
    """Writes a whole array, of which few elements may be read at a time; returns the hash of it."""
    fill, shape, few, shard = int(np.iinfo(values.dtype).max), values.shape[1:], arrays.FEW, arrays.SHARD_OF_FEW
    array = arrays.create(str(path), values.dtype, fill, shape=shape, chunk=few, shard=shard)
    arrays.append(array, str(path), values)
    return xxhash.xxh3_128_hexdigest(values.astype(values.dtype.newbyteorder("<")).tobytes())


class Blocks:
    """An array that grows by whole shards, and the hash of each of its blocks; holds one shard in memory."""

    def __init__(self, path: Path, dtype: np.dtype, *, shape: tuple[int, ...] = (), block: int, shard: int):
        """Begins an empty array in a new folder: `block` elements are hashed together, `shard` of them are a file."""
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
        return write_array(self._path.with_name(self._path.name + BLOCKS), np.array(self._hashes, np.uint64))

    def _flush(self, cut: int) -> None:
        values = np.concatenate(self._waiting)
        if cut:
            self._array = arrays.append(self._array, str(self._path), values[:cut])
            self._hashes += [hash_block(values[at : min(at + self._block, cut)]) for at in range(0, cut, self._block)]
        self._waiting, self._count = [values[cut:]], len(values) - cut


class SplitWriter:
    """Appends documents to a split in an empty folder; holds about one shard of tokens in memory."""

    def __init__(self, folder: Path, dtype: np.dtype, *, masked: bool):
        self._folder, self._lengths, self._bytes = folder, [np.empty(0, np.int64)], 0
        types = {TOKENS: dtype, MASK: np.dtype(np.uint8)} if masked else {TOKENS: dtype}
        block, shard = arrays.CHUNK, arrays.SHARD
        self._arrays = [Blocks(folder / name, each, block=block, shard=shard) for name, each in types.items()]

    def add(self, tokens_N: np.ndarray, lengths_D: np.ndarray, mask_N: np.ndarray | None, n_bytes: int) -> None:
        """Appends documents, each with its end; `mask_N` says which tokens are learned, `n_bytes` are of their text."""
        for array, values in zip(self._arrays, (tokens_N, mask_N), strict=False):
            assert values is not None
            array.add(values)
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
        digests = [array.close() for array in self._arrays]
        digests += [write_array(self._folder / OFFSETS, offsets), write_array(self._folder / LENGTHS, lengths_D)]
        return SplitInfo(
            documents=len(lengths_D),
            tokens=int(offsets[-1]),
            bytes=self._bytes,
            longest=int(lengths_D.max(initial=0)),
            digest=xxhash.xxh3_128_hexdigest("".join(digests).encode()),
        )
