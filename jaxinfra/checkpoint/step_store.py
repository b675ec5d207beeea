"""The checkpoints in one place as files, to list, verify, compare, copy and delete them. Imports neither JAX nor Orbax.

A run may be training there meanwhile: a step that it deletes is not damaged (`StepStore.still_has`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from jaxinfra.checkpoint.manifest import DamageError, Manifest
from jaxinfra.storage.lease import Lease


@dataclass(frozen=True, kw_only=True)
class Leftover:
    """A folder that is no step.

    Attributes:
        name: of the folder.
        kind: "damaged" for a step that was set aside, "incomplete" for what a save or a deletion that goes on, or was
            interrupted, has left.
        num_bytes: of its files; None if unknown.
    """

    name: str
    kind: Literal["damaged", "incomplete"]
    num_bytes: int | None


class StepStore(Protocol):
    """The checkpoints in one place. Its methods raise StorageError if it cannot be read or written."""

    location: str
    """The path or URL."""

    def steps(self) -> list[int]:
        """Returns the steps, ascending, damaged ones too."""
        ...

    def manifest(self, step: int) -> Manifest:
        """Returns the manifest of a step; raises DamageError if it is missing or damaged."""
        ...

    def missing(self, step: int, manifest: Manifest) -> list[str]:
        """Returns what is wrong with the files of a step that are not there or have another length; reads none."""
        ...

    def compare(self, step: int, manifest: Manifest) -> Iterator[tuple[str, int, DamageError | None]]:
        """Reads all files of a step in parallel; yields name, bytes and damage, if any, of each block."""
        ...

    def read_leaf(self, step: int, manifest: Manifest, name: str) -> np.ndarray:
        """Reads a leaf of a step; raises DamageError. On a disk the caller has verified the step."""
        ...

    def leftovers(self) -> list[Leftover]:
        """Returns what is there beside the steps."""
        ...

    def delete(self, steps: Sequence[int], leftovers: Sequence[Leftover], lease: Lease) -> None:
        """Deletes steps and leftovers, for the holder of the run's lease."""
        ...

    def still_has(self, step: int, manifest: Manifest | None) -> bool:
        """Returns whether a step is there still, with this manifest (None: a damaged one)."""
        if step not in self.steps():
            return False
        try:
            return manifest is None or self.manifest(step) == manifest
        except DamageError:
            return True


def step_health(stored: StepStore, step: int) -> tuple[Manifest | None, list[str]] | None:
    """Returns the manifest of a step, None if it is damaged, and what is wrong with it or the lengths of its files.

    Returns None if the step is gone.
    """
    manifest = None
    try:
        manifest = stored.manifest(step)
        problems = stored.missing(step, manifest)
    except DamageError as damage:
        problems = [str(damage)]
    return (manifest, problems) if not problems or stored.still_has(step, manifest) else None
