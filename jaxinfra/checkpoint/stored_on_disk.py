"""The checkpoints in a directory as files. Imports neither JAX nor Orbax."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import override

import numpy as np
import tensorstore as ts

from jaxinfra.checkpoint import disk_steps
from jaxinfra.checkpoint.manifest import (
    DamageError,
    Manifest,
    check_size,
    compare_files,
    read_manifest,
)
from jaxinfra.checkpoint.stored import Leftover, StoredCheckpoints
from jaxinfra.storage.errors import storage_errors
from jaxinfra.storage.lease import Lease


class StoredOnDisk(StoredCheckpoints):
    """The checkpoints in a directory, which need not exist."""

    def __init__(self, directory: Path) -> None:
        self.location, self.directory = str(directory), directory

    @override
    def steps(self) -> list[int]:
        with storage_errors(self.location, action="read"):
            return disk_steps.list_steps(self.directory)

    @override
    def manifest(self, step: int) -> Manifest:
        with storage_errors(self.location, action="read"):
            return read_manifest(self.folder(step), step)

    @override
    def missing(self, step: int, manifest: Manifest) -> list[str]:
        problems = []
        for name in manifest.files:
            try:
                with storage_errors(self.location, action="read"):
                    check_size(self.folder(step), manifest, name)
            except DamageError as damage:
                problems.append(str(damage))
        return problems

    @override
    def compare(self, step: int, manifest: Manifest) -> Iterator[tuple[str, int, DamageError | None]]:
        sound = []
        for name in manifest.files:
            try:
                check_size(self.folder(step), manifest, name)
                sound.append(name)
            except DamageError as damage:
                yield name, 0, damage
        with storage_errors(self.location, action="read"):
            yield from compare_files(self.folder(step), manifest, sound)

    @override
    def read_leaf(self, step: int, manifest: Manifest, name: str) -> np.ndarray:
        part, _, within = name.partition(".")
        kvstore: dict[str, object] = {"driver": "ocdbt", "base": f"file://{self.folder(step).absolute() / part}/"}
        spec = {"driver": "zarr", "kvstore": kvstore | ({"path": f"{within}/"} if within else {})}
        try:
            return ts.open(spec, open=True, read=True).result().read().result()
        except ValueError as error:
            raise DamageError(f"{name}: {error}") from error

    @override
    def leftovers(self) -> list[Leftover]:
        def describe(path: Path, kind: str) -> Leftover:
            num_bytes = disk_steps.folder_bytes(path)
            return Leftover(name=path.name, kind="damaged" if kind == "damaged" else "incomplete", num_bytes=num_bytes)

        with storage_errors(self.location, action="read"):
            damaged = [describe(path, "damaged") for path in disk_steps.set_aside(self.directory)]
            return damaged + [describe(path, "incomplete") for path in disk_steps.incomplete(self.directory)]

    @override
    def delete(self, steps: Sequence[int], leftovers: Sequence[Leftover], lease: Lease) -> None:
        for name in (*map(str, steps), *(each.name for each in leftovers)):
            lease.check_now()
            with storage_errors(self.directory / name):
                disk_steps.delete(self.directory / name)

    def folder(self, step: int) -> Path:
        """Returns the folder of a step."""
        return self.directory / str(step)
