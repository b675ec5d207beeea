"""Decides which documents of all parts a version keeps: duplicates and overlaps of the splits may be left out.

Memory per document: 16 bytes for its hash, and with `dedup` 16 more and its MinHash. Shape suffixes: D documents of a
part, V records of the validation split, T records of the training split.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from jaxinfra.config.text import snake_case
from jaxinfra.data.store.manifest import SPLITS, Counts, Split
from jaxinfra.errors import ConfigError, DataError
from jaxinfra.prepare import parts
from jaxinfra.prepare.documents.dedup import Dedup, find_duplicates
from jaxinfra.prepare.documents.document import Text
from jaxinfra.prepare.parts import KeepMasks, PartSplits
from jaxinfra.prepare.recipes import Recipe
from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.recipes.validation import ByKey, Tail

_MAX_LOCATIONS = 3  # locations of overlapping documents in a message


class EmptySplitError(ConfigError):
    """A split has no documents; more records may mend it."""


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
    names = ["digest_D2"]
    if dedup is not None:
        names = ["exact_D2", "near_DP"] if dedup.near else ["exact_D2"]
    # The sizes are the numbers of documents of the parts.
    validation_sizes, validation = _read_columns(splits, "validation", names)
    train_sizes, train = _read_columns(splits, "train", names)
    if dedup is None:
        overlap_V, keep_V, keep_T = _find_overlap(validation[0], train[0], per_record, recipe.on_overlap == "drop")
    else:  # all documents of a record have its signature, so the first one is enough
        validation, train = ([column[::per_record] for column in columns] for columns in (validation, train))
        overlap_V, keep_V, keep_T = _find_overlap_and_duplicates(dedup, validation, train)
    if recipe.on_overlap == "fail" and overlap_V.any():
        raise _overlap_error(overlap_V, _read_columns(splits, "validation", ["where_D"])[1][0][::per_record])
    num_dropped = per_record * int((~keep_V).sum() + (~keep_T).sum())
    dropped = {"overlap_dropped" if dedup is None else "duplicates": num_dropped}
    counts = replace(counts, overlap=per_record * int(overlap_V.sum()), **dropped)
    keep: KeepMasks = {
        "train": np.split(np.repeat(keep_T, per_record), np.cumsum(train_sizes)[:-1]),
        "validation": np.split(np.repeat(keep_V, per_record), np.cumsum(validation_sizes)[:-1]),
    }
    num_kept: dict[Split, int] = {split: sum(int(keep_D.sum()) for keep_D in keep[split]) for split in SPLITS}
    if not all(num_kept.values()):
        raise _empty_split_error(recipe, num_kept, counts)
    return keep, counts


def _count_records(splits: PartSplits, build: Path) -> Counts:
    """Counts the records, and lists bad ones in `skipped.jsonl` of `build`."""
    metadata = [parts.read_metadata(splits.folder, number) for number in range(splits.num_parts)]
    skipped = [{"where": location, "cause": cause} for part in metadata for location, cause in part.skipped]
    if skipped:
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in skipped)
        (build / "skipped.jsonl").write_text("".join(lines), encoding="utf-8")
    filtered = sum((Counter(part.filtered) for part in metadata), Counter[str]())
    records = sum(part.records for part in metadata)
    return Counts(records=records, skipped=len(skipped), filtered=dict(sorted(filtered.items())))


def _read_columns(splits: PartSplits, split: Split, names: Sequence[str]) -> tuple[list[int], list[np.ndarray]]:
    """Returns the number of documents of each part, and each array concatenated over all parts."""
    arrays_of_parts = list(splits.read(split, *names))
    columns = [np.concatenate(column) for column in zip(*arrays_of_parts, strict=True)]
    return [len(arrays[0]) for arrays in arrays_of_parts], columns


def _find_overlap(
    validation_D2: np.ndarray, train_D2: np.ndarray, per_record: int, drop: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compares records by the hashes of their documents; returns overlap_V, keep_V and keep_T, all bool."""
    record_hash = np.dtype((np.void, 16 * per_record))  # the hashes of all documents of a record as one value
    validation_V, train_T = (hashes_D2.reshape(-1).view(record_hash) for hashes_D2 in (validation_D2, train_D2))
    keep_T = ~np.isin(train_T, validation_V) if drop else np.ones(len(train_T), bool)
    return np.isin(validation_V, train_T), np.ones(len(validation_V), bool), keep_T


def _find_overlap_and_duplicates(
    dedup: Dedup, validation: Sequence[np.ndarray], train: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compares records by their signatures; returns overlap_V, keep_V and keep_T, all bool."""

    def find(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> np.ndarray:
        exact, *near = (np.concatenate(both) for both in zip(first, second, strict=True))
        return find_duplicates(dedup, exact, near[0] if near else None)

    keep_V, keep_T = np.split(~find(validation, train), [len(validation[0])])
    # A validation record overlaps if it is a duplicate when the training records come first.
    overlap_V = np.zeros(len(keep_V), bool)
    overlap_V[keep_V] = find(train, [column[keep_V] for column in validation])[len(keep_T) :]
    return overlap_V, keep_V, keep_T


def _overlap_error(overlap_V: np.ndarray, locations_V: np.ndarray) -> DataError:
    locations = locations_V[overlap_V].tolist()
    some = ", ".join(locations[:_MAX_LOCATIONS]) + (", ..." if len(locations) > _MAX_LOCATIONS else "")
    return DataError(
        f"on_overlap=fail: {len(locations):,} of {len(overlap_V):,} validation documents are in the training split too "
        f"({some}); correct the sources, or drop them from training with on_overlap=drop"
    )


def _empty_split_error(recipe: Recipe, num_kept: Mapping[Split, int], counts: Counts) -> EmptySplitError:
    """Returns the error for a split without documents."""
    validation, total_kept = recipe.validation, sum(num_kept.values())
    lost = f"{counts.records} records read, {counts.skipped} skipped, {sum(counts.filtered.values())} filtered"
    if not total_kept:
        return EmptySplitError(f"store={recipe.store}: the corpus is empty: {lost}; correct the source or the filters")
    if not isinstance(validation, ByKey | Tail):
        empty = "validation" if num_kept["train"] else "source"
        return EmptySplitError(
            f"{empty}: gives no documents ({lost}; all {total_kept} that are left are from the other source); correct "
            f"{empty} or the filters, or use validation=by_key"
        )
    empty = "training" if num_kept["validation"] else "validation"
    is_text = isinstance(recipe, Corpus) and isinstance(recipe.format, Text)
    can_cut = is_text and isinstance(validation, ByKey)
    fix = "or use validation=tail, which cuts the text of a single document" if can_cut else "or more records"
    return EmptySplitError(
        f"validation={snake_case(type(validation))} validation.fraction={validation.fraction}: puts none of "
        f"{total_kept} records in the {empty} split; use another fraction, {fix}"
    )
