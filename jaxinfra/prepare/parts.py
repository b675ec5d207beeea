"""Parts: the outputs of jobs, each a file in the work folder. Renaming the file into place commits it.

A part is an uncompressed `.npz`, in which every array has a CRC-32. A killed process leaves only complete parts and
temporary files.
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
class PartMetadata:
    """Counts of a part, and the position of a stream."""

    tokens: int = 0  # number of tokens in all splits; 0 for images
    records: int  # number of records that were read
    read_bytes: int  # of the source, estimated
    skipped: tuple[tuple[str, str], ...] = ()  # location and cause of each bad record
    filtered: Mapping[str, int] = field(default_factory=dict)  # documents that each filter rule left out
    position: Mapping[str, Any] = field(default_factory=dict)  # in the stream, after the last record of the part


@dataclass(frozen=True, kw_only=True)
class Part(PartMetadata):
    """Output of one job: arrays of each split, by names that the builder knows."""

    splits: Mapping[Split, Mapping[str, np.ndarray]]


def part_path(folder: Path, number: int) -> Path:
    """Returns the path of a part."""
    return folder / f"{number:08d}{_SUFFIX}"


def part_numbers(folder: Path) -> list[int]:
    """Lists the committed parts, sorted."""
    return sorted(int(path.stem) for path in folder.glob(f"*{_SUFFIX}") if path.stem.isdecimal())


def write_part(folder: Path, number: int, part: Part) -> PartMetadata:
    """Writes and commits a part; OSError, and no part, if it cannot be written."""
    metadata = PartMetadata(**{each.name: getattr(part, each.name) for each in fields(PartMetadata)})
    arrays = {f"{split}.{name}": array for split, named in part.splits.items() for name, array in named.items()}
    with open_atomic(part_path(folder, number)) as file:
        encoded = np.frombuffer(json.dumps(vars(metadata)).encode(), np.uint8)
        np.savez(file, allow_pickle=False, **{_META: encoded}, **arrays)
    return metadata


@contextmanager
def open_part(folder: Path, number: int) -> Iterator[Mapping[str, np.ndarray]]:
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
    return PartMetadata(**values | {"skipped": tuple((location, cause) for location, cause in values["skipped"])})
