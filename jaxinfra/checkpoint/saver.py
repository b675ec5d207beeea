"""Declares what `DiskSaver` and `BucketSaver`, which write and restore checkpoints, have in common."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from jaxinfra.checkpoint.config import Metrics
from jaxinfra.checkpoint.leaves import PyTree

type Gather = Callable[[Any], Sequence[Any]]
"""Returns the values (JSON) of all processes by index; each must call it equally often."""


class Saver(Protocol):
    """Saves and restores the state of a run in one place. All processes make the same calls."""

    def save(self, step: int, state: PyTree, record: Mapping[str, object], metrics: Metrics) -> None:
        """Starts to write a step; returns when the arrays may be changed or donated."""
        ...

    def is_saving(self) -> bool:
        """Returns whether a step is being written."""
        ...

    def wait_until_finished(self) -> None:
        """Waits until the step being written, if any, is complete and old steps are deleted; raises its error."""
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
