"""Declares what `OrbaxBackend` and `BucketBackend`, which read and write checkpoints, have in common."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from jaxinfra.checkpoint.leaves import PyTree
from jaxinfra.checkpoint.manifest import Manifest
from jaxinfra.checkpoint.retention import Metrics

type Gather = Callable[[Any], Sequence[Any]]
"""Returns the values (JSON) of all processes by index; each must call it equally often."""


class Backend(Protocol):
    """The checkpoints in one place. All processes make the same calls."""

    def all_steps(self) -> list[int]:
        """Returns the steps of all checkpoints, ascending, damaged ones too."""
        ...

    def manifest(self, step: int) -> Manifest:
        """Returns the manifest of a step, whose files are there; raises DamageError."""
        ...

    def save(self, step: int, state: PyTree, record: Mapping[str, object], metrics: Metrics) -> None:
        """Starts to write a step; returns when the arrays may be changed or donated."""
        ...

    def is_saving(self) -> bool:
        """Returns whether a step is being written."""
        ...

    def wait_until_finished(self) -> None:
        """Waits until the step being written, if any, is complete and old steps are deleted; raises its error."""
        ...

    def verify(self, step: int, parts: Sequence[str] | None = None, *, part: int = 0, of: int = 1) -> None:
        """Hashes the files of a step, or of these parts of its state; raises DamageError.

        `part` and `of` divide the work among processes.
        """
        ...

    def restore[T](self, step: int, abstract: T) -> T:
        """Restores what `abstract` has of a step's state, as `jax.ShapeDtypeStruct`s; raises DamageError."""
        ...

    def set_aside(self, step: int) -> str:
        """Moves a damaged step, so that it is no checkpoint any more; returns its new path or URL."""
        ...

    def reset(self) -> None:
        """Forgets a save that has failed; the next one starts anew."""
        ...

    def close(self) -> None:
        """Waits for the step being written and ends all threads."""
        ...
