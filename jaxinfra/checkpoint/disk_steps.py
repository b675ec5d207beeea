"""The checkpoints in a directory: which folders are steps, and what saves and deletions have left. Imports no JAX.

STEP                          a complete checkpoint
STEP.damaged, STEP.damaged-2  one that was set aside
STEP.orbax-checkpoint-tmp...  a save or a copy in progress, or what an interrupted one has left
.deleted-STEP                 what an interrupted deletion has left
"""

import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, override

import numpy as np
import tensorstore as ts

from jaxinfra.checkpoint.manifest import DamageError, Manifest, check_sizes, compare_files, read_manifest
from jaxinfra.checkpoint.step_store import Leftover, StepStore
from jaxinfra.storage.errors import storage_errors
from jaxinfra.storage.lease import Lease

TEMPORARY = ".orbax-checkpoint-tmp"
"""Ending of the name of a temporary folder, after the step; Orbax's `TMP_DIR_SUFFIX`."""

_DELETED = ".deleted-"
_STEP = re.compile(r"0|[1-9]\d*", re.ASCII)
_INCOMPLETE = re.compile(rf"\d+{re.escape(TEMPORARY)}.*|{re.escape(_DELETED)}.*", re.ASCII)
_DAMAGED = re.compile(r"\d+\.damaged(-\d+)?", re.ASCII)


def read_context() -> ts.Context:
    """Returns a context that caches where arrays are in the files of a step, and nothing of them.

    Each read of a step takes its own: by then another step may have come to the same path.
    """
    return ts.Context({"cache_pool": {"total_bytes_limit": 0}, "cache_pool#tree": {"total_bytes_limit": 16 << 20}})


class DiskSteps(StepStore):
    """The checkpoints in a directory, which need not exist."""

    def __init__(self, directory: Path) -> None:
        self.location, self.directory = str(directory), directory

    @override
    def steps(self) -> list[int]:
        return sorted(int(path.name) for path in self._named(_STEP))

    @override
    def manifest(self, step: int) -> Manifest:
        with storage_errors(self.location, action="read"):
            return read_manifest(self.folder(step), step)

    @override
    def missing(self, step: int, manifest: Manifest) -> list[str]:
        with storage_errors(self.location, action="read"):
            return [str(damage) for damage in check_sizes(self.folder(step), manifest, manifest.files).values()]

    @override
    def compare(self, step: int, manifest: Manifest) -> Iterator[tuple[str, int, DamageError | None]]:
        with storage_errors(self.location, action="read"):
            yield from compare_files(self.folder(step), manifest, manifest.files)

    @override
    def read_leaf(self, step: int, manifest: Manifest, name: str) -> np.ndarray:
        try:
            return self.open_leaf(step, name, read_context()).read().result()
        except ValueError as error:
            raise DamageError(f"{name}: {error}") from error

    def open_leaf(self, step: int, name: str, context: ts.Context) -> ts.TensorStore:
        """Opens an array of a step; raises ValueError of TensorStore if it is missing or damaged."""
        part, _, within = name.partition(".")
        base = {"driver": "file", "path": f"{self.folder(step).absolute() / part}/"}  # a URL would need its escapes
        kvstore = {
            "driver": "ocdbt",
            "base": base,
            "path": f"{within}/" if within else "",
            "cache_pool": "cache_pool#tree",
        }
        spec = {"driver": "zarr", "kvstore": kvstore, "recheck_cached_data": "open"}
        return ts.open(spec, open=True, read=True, context=context).result()

    @override
    def leftovers(self) -> list[Leftover]:
        def found(kind: Literal["damaged", "incomplete"], pattern: re.Pattern[str]) -> list[Leftover]:
            with storage_errors(self.location, action="read"):
                return [
                    Leftover(name=path.name, kind=kind, num_bytes=folder_bytes(path)) for path in self._named(pattern)
                ]

        return found("damaged", _DAMAGED) + found("incomplete", _INCOMPLETE)

    @override
    def delete(self, steps: Sequence[int], leftovers: Sequence[Leftover], lease: Lease) -> None:
        for name in (*map(str, steps), *(each.name for each in leftovers)):
            lease.check_now()
            with storage_errors(self.directory / name):
                delete(self.directory / name)

    def folder(self, step: int) -> Path:
        """Returns the folder of a step."""
        return self.directory / str(step)

    def path_aside(self, step: int) -> Path:
        """Returns a new name for the folder of a damaged step."""
        names = (f"{step}.damaged{'' if number == 1 else f'-{number}'}" for number in range(1, 1000))
        return next(path for name in names if not (path := self.directory / name).exists())

    def incomplete(self) -> list[Path]:
        """Returns what saves and deletions that go on, or were interrupted, have left."""
        return self._named(_INCOMPLETE)

    def _named(self, pattern: re.Pattern[str]) -> list[Path]:
        with storage_errors(self.location, action="read"):
            found = self.directory.iterdir() if self.directory.is_dir() else ()
            return [path for path in found if pattern.fullmatch(path.name)]


def hide(folder: Path) -> Path:
    """Renames a folder that will be deleted, so that no other process sees a part of it, or completes it."""
    if folder.name.startswith(_DELETED):
        return folder
    return folder.rename(folder.with_name(f"{_DELETED}{folder.name}"))


def delete(folder: Path) -> None:
    """Deletes a folder, which is hidden first."""
    shutil.rmtree(hide(folder))


def folder_bytes(folder: Path) -> int:
    """Returns the bytes of all files in a folder, as far as they are there still."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # a save in progress replaces its files
            continue
    return total
