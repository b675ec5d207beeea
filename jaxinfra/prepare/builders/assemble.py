"""Assembles parts into the arrays of a version: all documents that are kept, in source order.

Reads one part at a time and holds one shard of tokens. Memory per document: 8 bytes each for offset and length, 16 for
its hash, and with `dedup` 16 more and its MinHash. After a kill this step is repeated, but tokenizing is not.
Shape suffixes: N tokens and D documents of a part, R records of both splits, V records of validation, T of training.
"""

import json
import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
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
from jaxinfra.prepare.documents.dedup import Dedup, Signer, find_duplicates
from jaxinfra.prepare.documents.document import Text
from jaxinfra.prepare.documents.shingles import hash128
from jaxinfra.prepare.recipes import Recipe
from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.recipes.validation import ByKey, Tail

_DECODE_TOKENS = 16  # tokens to decode before a cut, to see whether it splits a character
_MAX_LOCATIONS = 3  # locations of overlapping documents in a message
_PACKAGES = ("jaxinfra", "tokenizers", "tensorstore", "numpy", "xxhash")

type _Arrays = Mapping[str, np.ndarray]
KeepMasks = Mapping[Split, Sequence[np.ndarray]]
"""Which documents of each part are kept: bool[D], by split."""


@dataclass(frozen=True, kw_only=True)
class PartSplits:
    """Reads the splits of all parts in order."""

    folder: Path
    numbers: Sequence[int]
    # With `validation=Tail`, all parts hold training data only. Then this has the parts (by number) of each split, and
    # the arrays of the part that the split cuts in two.
    tail: Mapping[Split, Sequence[int | _Arrays]] | None = None

    def read(self, split: Split, *names: str) -> Iterator[tuple[np.ndarray, ...]]:
        """Yields arrays of a split for each part; DataError if a part is damaged."""
        stored_split = split if self.tail is None else "train"
        for source in self.numbers if self.tail is None else self.tail[split]:
            if isinstance(source, int):
                with parts.open_part(self.folder, source) as part:
                    yield tuple(part[f"{stored_split}.{name}"] for name in names)
            else:
                yield tuple(source[name] for name in names)

    def read_kept(self, split: Split, keep: KeepMasks, *names: str) -> Iterator[tuple[np.ndarray, ...]]:
        """Yields arrays of the kept documents for each part; arrays `*_N` have `lengths_D` elements per document."""
        for values, keep_D in zip(self.read(split, *names), keep[split], strict=True):
            if not keep_D.all():
                lengths_D = dict(zip(names, values, strict=True)).get("lengths_D", 1)  # 1: no array of tokens is read
                keep_N = np.repeat(keep_D, lengths_D)
                masks = (keep_N if name.endswith("_N") else keep_D for name in names)
                values = tuple(array[mask] for array, mask in zip(values, masks, strict=True))
            yield values


def provenance() -> dict[str, Any]:
    """Returns the manifest fields `versions` (of Python and packages) and `created` (time)."""
    return {
        "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def select_documents(recipe: Recipe, splits: PartSplits, build: Path) -> tuple[KeepMasks, Counts]:
    """Decides which documents are kept, counts the others, and lists bad records in `skipped.jsonl` of `build`.

    Of equal documents, the first one in the validation split is kept, else the first one in source order. The overlap
    of the splits is counted before duplicates are removed, and includes near duplicates if those are removed. The
    documents of a record are kept or dropped together. Raises as `StoreBuilder.assemble`.
    """
    per_record, dedup = 1, None
    if isinstance(recipe, Corpus):
        per_record, dedup = recipe.format.documents_per_record, recipe.dedup
    counts = _count_records(splits, build)
    if not counts.records:
        raise _empty_split_error(recipe, dict.fromkeys(SPLITS, 0), counts)
    names: tuple[str, ...] = ("digest_D2",)
    if dedup is not None:
        names = ("exact_D2", "near_DP") if dedup.near else ("exact_D2",)
    sizes_V, validation = _read_columns(splits, "validation", names)
    sizes_T, train = _read_columns(splits, "train", names)
    num_validation = sum(sizes_V) // per_record  # records; in keep_R, validation comes before training
    if dedup is None:  # compares records by the hashes of all their documents
        validation_RK, train_RK = (columns[0].reshape(-1, 2 * per_record) for columns in (validation, train))
        overlap_V, keep_R = _rows_in(validation_RK, train_RK), np.ones(num_validation + len(train_RK), bool)
        if recipe.on_overlap == "drop":
            keep_R[num_validation:] = ~_rows_in(train_RK, validation_RK)
    else:  # all documents of a record have its signature, so the first one is enough
        validation, train = ([rows[::per_record] for rows in columns] for columns in (validation, train))
        keep_R = ~_find_duplicates(dedup, validation, train)
        # A validation document overlaps if it is a duplicate when the training documents come first.
        overlap_V = np.zeros(num_validation, bool)
        unique_validation = [rows[keep_R[:num_validation]] for rows in validation]
        overlap_V[keep_R[:num_validation]] = _find_duplicates(dedup, train, unique_validation)[len(train[0]) :]
    if recipe.on_overlap == "fail" and overlap_V.any():
        raise _overlap_error(overlap_V, _read_columns(splits, "validation", ("where_D",))[1][0][::per_record])
    dropped = {"overlap_dropped" if dedup is None else "duplicates": per_record * int((~keep_R).sum())}
    counts = replace(counts, overlap=per_record * int(overlap_V.sum()), **dropped)
    masks = np.split(np.repeat(keep_R, per_record), np.cumsum([*sizes_V, *sizes_T])[:-1])  # one for each part
    keep: KeepMasks = {"validation": masks[: len(sizes_V)], "train": masks[len(sizes_V) :]}
    num_kept: dict[Split, int] = {split: sum(int(mask.sum()) for mask in keep[split]) for split in SPLITS}
    if not all(num_kept.values()):
        raise _empty_split_error(recipe, num_kept, counts)
    return keep, counts


def _count_records(splits: PartSplits, build: Path) -> Counts:
    """Counts the records, and lists bad ones in `skipped.jsonl` of `build`."""
    metadata = [parts.read_metadata(splits.folder, number) for number in splits.numbers]
    skipped = [{"where": location, "cause": cause} for part in metadata for location, cause in part.skipped]
    if skipped:
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in skipped)
        (build / "skipped.jsonl").write_text("".join(lines), encoding="utf-8")
    filtered = sum((Counter(part.filtered) for part in metadata), Counter[str]())
    records = sum(part.records for part in metadata)
    return Counts(records=records, skipped=len(skipped), filtered=dict(sorted(filtered.items())))


def _overlap_error(overlap_V: np.ndarray, locations_V: np.ndarray) -> DataError:
    locations = locations_V[overlap_V].tolist()
    some = ", ".join(locations[:_MAX_LOCATIONS]) + (", ..." if len(locations) > _MAX_LOCATIONS else "")
    return DataError(
        f"on_overlap=fail: {len(locations):,} of {len(overlap_V):,} validation documents are in the training split too "
        f"({some}); correct the sources, or drop them from training with on_overlap=drop"
    )


def _empty_split_error(recipe: Recipe, num_kept: Mapping[Split, int], counts: Counts) -> ConfigError:
    """Returns the error for a split without documents."""
    validation, total_kept = recipe.validation, sum(num_kept.values())
    lost = f"{counts.records} records read, {counts.skipped} skipped, {sum(counts.filtered.values())} filtered"
    if not total_kept:
        return ConfigError(f"store={recipe.store}: the corpus is empty: {lost}; correct the source or the filters")
    if not isinstance(validation, ByKey | Tail):
        empty = "validation" if num_kept["train"] else "source"
        return ConfigError(
            f"{empty}: gives no documents ({lost}; all {total_kept} that are left are from the other source); correct "
            f"{empty} or the filters, or use validation=by_key"
        )
    empty = "training" if num_kept["validation"] else "validation"
    is_text = isinstance(recipe, Corpus) and isinstance(recipe.format, Text)
    can_cut = is_text and isinstance(validation, ByKey)
    fix = "or use validation=tail, which cuts the text of a single document" if can_cut else "or more records"
    return ConfigError(
        f"validation={snake_case(type(validation))} validation.fraction={validation.fraction}: puts none of "
        f"{total_kept} records in the {empty} split; use another fraction, {fix}"
    )


def _read_columns(splits: PartSplits, split: Split, names: Sequence[str]) -> tuple[list[int], list[np.ndarray]]:
    """Returns the number of documents of each part, and each array concatenated over all parts."""
    columns = list(splits.read(split, *names))
    return [len(rows[0]) for rows in columns], [np.concatenate(column) for column in zip(*columns, strict=True)]


def _rows_in(rows_NK: np.ndarray, others_MK: np.ndarray) -> np.ndarray:
    """Returns which rows are among the others: bool[N]."""
    # Compares the first columns in NumPy, then whole rows in Python, but only the few whose first column matches.
    is_in_N = np.isin(rows_NK[:, 0], others_MK[:, 0])
    candidates = set(map(tuple, others_MK[np.isin(others_MK[:, 0], rows_NK[is_in_N, 0])].tolist()))
    is_in_N[is_in_N] = [tuple(row) in candidates for row in rows_NK[is_in_N].tolist()]
    return is_in_N


def _find_duplicates(dedup: Dedup, earlier: Sequence[np.ndarray], later: Sequence[np.ndarray]) -> np.ndarray:
    """Returns `find_duplicates` of the earlier documents followed by the later ones."""
    exact_N2, *near = (np.concatenate(both) for both in zip(earlier, later, strict=True))
    return find_duplicates(dedup, exact_N2, near[0] if near else None)


def split_tail(splits: PartSplits, corpus: Corpus, config: Tail, tokenizer: Tokenizer) -> PartSplits:
    """Splits the tail off parts that hold training data only; raises as `PartSplits.read`.

    The document in which the tail begins is split between two tokens if it is plain text; other records stay whole.
    """
    form, per_record = corpus.format, corpus.format.documents_per_record
    bytes_of_parts = [bytes_D for (bytes_D,) in splits.read("train", "bytes_D")]
    ends = np.cumsum([int(bytes_D.sum()) for bytes_D in bytes_of_parts])
    train_bytes = int(ends[-1] * (1 - config.fraction))
    # Finds the part in which the tail begins, then the document in it, and how many of its bytes are training text.
    index = min(int(np.searchsorted(ends, train_bytes, side="right")), len(ends) - 1)
    bytes_D = bytes_of_parts[index]
    bytes_in_part = train_bytes - (int(ends[index - 1]) if index else 0)
    document = int(np.searchsorted(np.cumsum(bytes_D), bytes_in_part, side="right"))
    bytes_in_document = bytes_in_part - int(bytes_D[:document].sum())
    with parts.open_part(splits.folder, splits.numbers[index]) as part:
        columns = {key.removeprefix("train."): part[key] for key in part if key.startswith("train.")}
    if not form.has_loss_mask and per_record == 1 and document < len(bytes_D):
        fraction = bytes_in_document / int(bytes_D[document])
        if halved := _split_document(columns, document, fraction, tokenizer, corpus.dedup):
            columns, document = halved, document + 1
    document = document // per_record * per_record  # the first document of its record
    if not document and not any(map(len, bytes_of_parts[:index])):
        document = per_record  # the first record is for training
    token = int(columns["lengths_D"][:document].sum())
    cuts = {name: token if name.endswith("_N") else document for name in columns}
    train = {name: values[: cuts[name]] for name, values in columns.items()}
    tail = {name: values[cuts[name] :] for name, values in columns.items()}
    before, after = splits.numbers[:index], splits.numbers[index + 1 :]
    return replace(splits, tail={"train": [*before, train], "validation": [tail, *after]})


def _split_document(
    columns: _Arrays, document: int, fraction: float, tokenizer: Tokenizer, dedup: Dedup | None
) -> _Arrays | None:
    """Splits a document at the first token after `fraction` that begins a character; None without such a token."""
    start = int(columns["lengths_D"][:document].sum())
    tokens_N = columns["tokens_N"][start : start + int(columns["lengths_D"][document])]
    ids, cut = tokens_N[:-1].tolist(), int((len(tokens_N) - 1) * fraction)
    while 0 < cut < len(ids) and tokenizer.decode(ids[max(0, cut - _DECODE_TOKENS) : cut]).endswith("\ufffd"):
        cut += 1
    if not 0 < cut < len(ids):
        return None
    halves = np.append(tokens_N[:cut], tokens_N[-1]), tokens_N[cut:]
    texts = tokenizer.decode(ids[:cut]), tokenizer.decode(ids[cut:])
    first_bytes = len(texts[0].encode())
    rows: dict[str, Any] = {
        "lengths_D": [len(half_N) for half_N in halves],
        "bytes_D": [first_bytes, int(columns["bytes_D"][document]) - first_bytes],
        "digest_D2": [hash128(half_N.tobytes()) for half_N in halves],
    }
    if dedup is not None:
        rows["exact_D2"], rows["near_DP"] = zip(*map(Signer(dedup), texts), strict=True)
    split = {"tokens_N": np.insert(columns["tokens_N"], start + cut, tokens_N[-1])}
    for name, values in columns.items():
        if name != "tokens_N":
            both = np.array(rows[name], values.dtype) if name in rows else values[[document, document]]
            split[name] = np.concatenate([values[:document], both, values[document + 1 :]])
    return split


def write_pack(build: Path, split: Split, config: PackSpec, lengths_D: np.ndarray) -> PackInfo:
    """Packs documents of these lengths, ends included, into rows, and writes the ranges of their segments."""
    packs = pack_documents(lengths_D, config.seq_len, by_length=config.by_length)
    offsets_D = np.cumsum(lengths_D) - lengths_D
    files = {
        "segments": np.stack([offsets_D[packs.segment_document] + packs.segment_start, packs.segment_length], axis=1),
        "rows": packs.row_offsets,
    }
    digest = xxhash.xxh3_128()
    for name, values in files.items():
        write_array(build / split / "packs" / config.name / name, values)
        digest.update(hash_block(values).to_bytes(8, "little"))
    return PackInfo(
        rows=packs.num_rows,
        segments=len(packs.segment_length),
        truncated=packs.cut_documents,
        efficiency=packs.efficiency,
        digest=digest.hexdigest(),
    )


def write_array(path: Path, values: np.ndarray) -> str:
    """Writes a whole array in small chunks, because a few elements are read at a time; returns its hash."""
    fill, shape, chunk, shard = int(np.iinfo(values.dtype).max), values.shape[1:], arrays.FEW, arrays.SHARD_OF_FEW
    array = arrays.create(str(path), values.dtype, fill, shape=shape, chunk=chunk, shard=shard)
    arrays.append(array, str(path), values)
    return xxhash.xxh3_128_hexdigest(values.astype(values.dtype.newbyteorder("<")).tobytes())


class HashedArrayWriter:
    """Writes an array in whole shards with a hash of each block; holds one shard in memory."""

    def __init__(self, path: Path, dtype: np.dtype, *, shape: tuple[int, ...] = (), block: int, shard: int):
        """Creates an empty array in a new folder, with a hash per `block` elements and a file per `shard` elements."""
        self._path, self._block, self._shard = path, block, shard
        fill = int(np.iinfo(dtype).max)
        self._array = arrays.create(str(path), dtype, fill, shape=shape, chunk=block, shard=shard)
        self._waiting, self._num_waiting = [np.empty((0, *shape), dtype)], 0  # the empty array sets shape and type
        self._hashes: list[int] = []

    def add(self, values: np.ndarray) -> None:
        """Appends elements."""
        self._waiting.append(values)
        self._num_waiting += len(values)
        if self._num_waiting >= self._shard:
            self._flush(self._num_waiting // self._shard * self._shard)

    def close(self) -> str:
        """Writes the last elements and the hashes; returns the digest of the hashes."""
        self._flush(self._num_waiting)
        return write_array(self._path.with_name(self._path.name + BLOCKS), np.array(self._hashes, np.uint64))

    def _flush(self, end: int) -> None:
        values = np.concatenate(self._waiting)
        if end:
            self._array = arrays.append(self._array, str(self._path), values[:end])
            blocks = (values[start : min(start + self._block, end)] for start in range(0, end, self._block))
            self._hashes += map(hash_block, blocks)
        self._waiting, self._num_waiting = [values[end:]], len(values) - end


class SplitWriter:
    """Writes the documents of a split to an empty folder; holds about one shard of tokens in memory."""

    def __init__(self, folder: Path, dtype: np.dtype, *, masked: bool):
        self._folder, self._lengths, self._bytes = folder, [np.empty(0, np.int64)], 0
        dtypes = {TOKENS: dtype, MASK: np.dtype(np.uint8)} if masked else {TOKENS: dtype}
        writer = partial(HashedArrayWriter, block=arrays.CHUNK, shard=arrays.SHARD)
        self._arrays = [writer(folder / name, each) for name, each in dtypes.items()]

    def add(self, tokens_N: np.ndarray, lengths_D: np.ndarray, mask_N: np.ndarray | None, num_bytes: int) -> None:
        """Appends documents with their ends; `mask_N` is 1 for tokens in the loss, `num_bytes` is the text's size."""
        for array, values in zip(self._arrays, (tokens_N, mask_N), strict=False):
            assert values is not None
            array.add(values)
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
        digests = [array.close() for array in self._arrays]
        digests += [write_array(self._folder / OFFSETS, offsets), write_array(self._folder / LENGTHS, lengths_D)]
        return SplitInfo(
            documents=len(lengths_D),
            tokens=int(offsets[-1]),
            bytes=self._bytes,
            longest=int(lengths_D.max(initial=0)),
            digest=xxhash.xxh3_128_hexdigest("".join(digests).encode()),
        )
