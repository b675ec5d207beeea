"""Parts: what a job made of its records, one file each in the work folder; to rename one into place is to commit it.

A part is an uncompressed `.npz`, whose every member has a CRC-32. A killed process leaves whole parts and temporary
names, nothing between.
"""

import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import numpy as np

from jaxinfra.data.store.manifest import Split
from jaxinfra.errors import DataError
from jaxinfra.storage.atomic import atomic_file

_META = "meta"
_SUFFIX = ".npz"
_DAMAGED = (ValueError, EOFError, zipfile.BadZipFile, zlib.error)


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
    with atomic_file(path_of(folder, number)) as file:
        meta = np.frombuffer(json.dumps(vars(note)).encode(), np.uint8)
        np.savez(file, allow_pickle=False, **{_META: meta}, **arrays)
    return note


class Open:
    """A part whose arrays are read one by one; a damaged one raises DataError."""

    def __init__(self, folder: Path, number: int):
        self._path = path_of(folder, number)
        try:
            self._arrays = np.load(self._path, allow_pickle=False)
        except _DAMAGED as error:
            raise self._damaged(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._arrays.close()

    @property
    def note(self) -> Note:
        """What is known of it without its arrays."""
        found = json.loads(self._read(_META).tobytes())
        return Note(**found | {"skipped": tuple((where, cause) for where, cause in found["skipped"])})

    def read(self, split: Split, name: str) -> np.ndarray:
        """Reads an array of a split."""
        return self._read(f"{split}.{name}")

    def read_all(self, split: Split) -> dict[str, np.ndarray]:
        """Reads all arrays of a split."""
        names = (name.removeprefix(f"{split}.") for name in self._arrays.files if name.startswith(f"{split}."))
        return {name: self.read(split, name) for name in names}

    def _read(self, name: str) -> np.ndarray:
        try:
            return self._arrays[name]
        except (KeyError, *_DAMAGED) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> DataError:
        return DataError(f"{self._path}: damaged ({error}); delete it and prepare again: its records are read anew")
