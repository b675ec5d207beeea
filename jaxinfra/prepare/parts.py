"""Parts: the outputs of jobs, each a file in the work folder. Renaming the file into place commits it.

A part is an uncompressed `.npz`, in which every array has a CRC-32. A killed process leaves only complete parts and
temporary files. Shape suffixes: N tokens and D documents of a part.
"""

import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxinfra.data.store.manifest import Split
from jaxinfra.errors import DataError
from jaxinfra.storage.atomic import open_atomic

_META = "meta"
_SUFFIX = ".npz"

type Arrays = Mapping[str, np.ndarray]
KeepMasks = Mapping[Split, Sequence[np.ndarray]]
"""Which documents of each part are kept: bool[D], by split."""


@dataclass(frozen=True, kw_only=True)
class PartMetadata:
    """Counts of a part, and the position of a stream, as JSON."""

    tokens: int = 0  # number of tokens in all splits; 0 for images
    records: int  # number of records that were read
    read_bytes: int  # of the source, estimated
    skipped: tuple[tuple[str, str], ...] = ()  # location and cause of each bad record
    filtered: Mapping[str, int] = field(default_factory=dict)  # documents that each filter rule left out
    position: Mapping[str, Any] = field(default_factory=dict)  # in the stream, after the last record of the part


def part_path(folder: Path, number: int) -> Path:
    """Returns the path of a part."""
    return folder / f"{number:08d}{_SUFFIX}"


def part_numbers(folder: Path) -> list[int]:
    """Lists the committed parts, sorted."""
    return sorted(int(path.stem) for path in folder.glob(f"*{_SUFFIX}") if path.stem.isdecimal())


def write_part(folder: Path, number: int, metadata: PartMetadata, splits: Mapping[Split, Arrays]) -> PartMetadata:
    """Writes and commits a part, and returns its metadata; OSError, and no part, if it cannot be written.

    The builder chooses the names of the arrays.
    """
    arrays = {f"{split}.{name}": array for split, named in splits.items() for name, array in named.items()}
    with open_atomic(part_path(folder, number)) as file:
        content = np.frombuffer(json.dumps(vars(metadata)).encode(), np.uint8)
        np.savez(file, allow_pickle=False, **{_META: content}, **arrays)
    return metadata


@contextmanager
def open_part(folder: Path, number: int) -> Iterator[Arrays]:
    """Opens the arrays of a part, named SPLIT.NAME and read when accessed; DataError if the part is damaged."""
    path = part_path(folder, number)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            yield arrays
    except (KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        fix = "delete it and prepare again, which reads its records again"
        raise DataError(f"{path}: is damaged ({error}); {fix}") from error


def read_metadata(folder: Path, number: int) -> PartMetadata:
    """Reads the metadata of a part; DataError if it is damaged."""
    with open_part(folder, number) as arrays:
        values = json.loads(arrays[_META].tobytes())
    return PartMetadata(**values | {"skipped": tuple(map(tuple, values["skipped"]))})


@dataclass(frozen=True, kw_only=True)
class PartSplits:
    """Reads the splits of all parts in order."""

    folder: Path
    num_parts: int
    # With `validation=Tail`, all parts hold training data only, and `split_tail` divides them: numbers of whole parts,
    # and arrays of the part that it cuts in two. For a tail that begins in part 2 of 4:
    # {"train": [0, 1, arrays], "validation": [arrays, 3]}
    tail: Mapping[Split, Sequence[int | Arrays]] | None = None

    def read(self, split: Split, *names: str) -> Iterator[tuple[np.ndarray, ...]]:
        """Yields the named arrays of a split for each part; DataError if a part is damaged."""
        stored_split = split if self.tail is None else "train"
        for source in range(self.num_parts) if self.tail is None else self.tail[split]:
            if isinstance(source, int):
                with open_part(self.folder, source) as part:
                    yield tuple(part[f"{stored_split}.{name}"] for name in names)
            else:
                yield tuple(source[name] for name in names)

    def read_kept(self, split: Split, keep: KeepMasks, *names: str) -> Iterator[tuple[np.ndarray, ...]]:
        """Yields the named arrays of kept documents for each part; names that end in _N need "lengths_D" among them."""
        for arrays, keep_D in zip(self.read(split, *names), keep[split], strict=True):
            if keep_D.all():
                yield arrays
                continue
            named = dict(zip(names, arrays, strict=True))
            yield tuple(
                array[np.repeat(keep_D, named["lengths_D"]) if name.endswith("_N") else keep_D]
                for name, array in named.items()
            )
