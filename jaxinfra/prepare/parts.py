"""Parts: what a job made of its records, one file each in the work folder; to rename one into place is to commit it.

A part is an uncompressed `.npz`, whose every member has a CRC-32. A killed process leaves whole parts and temporary
names, nothing between.
"""

import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from jaxinfra.data.store.manifest import Split
from jaxinfra.errors import DataError
from jaxinfra.storage.atomic import open_atomic

_META = "meta"
_SUFFIX = ".npz"


@dataclass(frozen=True, kw_only=True)
class Note:
    """What is known of a part without its arrays.

    Attributes:
        tokens: of all splits; of images 0.
        records: how many were read.
        read_bytes: of the source, about.
        skipped: where and why a record could not be read.
        filtered: documents left out, by rule.
        position: where a stream stands after it.
    """

    tokens: int = 0
    records: int
    read_bytes: int
    skipped: tuple[tuple[str, str], ...] = ()
    filtered: Mapping[str, int] = field(default_factory=dict)
    position: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Part(Note):
    """What one job made: the arrays of each split, by names that are known to who makes and assembles them."""

    splits: Mapping[Split, Mapping[str, np.ndarray]]


def path_of(folder: Path, number: int) -> Path:
    """Returns where a part stands."""
    return folder / f"{number:08d}{_SUFFIX}"


def numbers(folder: Path) -> list[int]:
    """Lists the parts that are there, in order; what a killed process left unfinished is none."""
    return sorted(int(path.stem) for path in folder.glob(f"*{_SUFFIX}") if path.stem.isdecimal())


def write(folder: Path, number: int, part: Part) -> Note:
    """Commits a part: it is there whole or not at all, whatever ends the process, or an OSError."""
    note = Note(**{each.name: getattr(part, each.name) for each in fields(Note)})
    arrays = {f"{split}.{name}": array for split, own in part.splits.items() for name, array in own.items()}
    with open_atomic(path_of(folder, number)) as file:
        meta = np.frombuffer(json.dumps(vars(note)).encode(), np.uint8)
        np.savez(file, allow_pickle=False, **{_META: meta}, **arrays)
    return note


@contextmanager
def opened(folder: Path, number: int) -> Iterator[Mapping[str, np.ndarray]]:
    """Gives the arrays of a part by SPLIT.NAME, each read when it is asked for; a damaged one is a DataError."""
    path = path_of(folder, number)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            yield arrays
    except (KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        cause = f"damaged ({error}); delete it and prepare again: its records are read anew"
        raise DataError(f"{path}: {cause}") from error


def note(folder: Path, number: int) -> Note:
    """Returns what is known of a part without its arrays; a damaged one is a DataError."""
    with opened(folder, number) as arrays:
        found = json.loads(arrays[_META].tobytes())
    return Note(**found | {"skipped": tuple((where, cause) for where, cause in found["skipped"])})
