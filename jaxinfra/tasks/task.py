"""What `Program` asks of a task: a description of the batch, and a loss that is a sum."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp

from jaxinfra.config import Problem
from jaxinfra.models.model import Model
from jaxinfra.parallel.rules import LogicalAxes


@dataclass(frozen=True, kw_only=True)
class Field:
    """One array of a batch: its global shape, dtype and logical axes."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: LogicalAxes


class Task(Protocol):
    """A task over batches of named arrays.

    Attributes:
        modality: what it is about, as of the models and the data that it goes with: "token" or "image".
        by_position: whether `finish` needs no more of the stream than a position at a time, but for its sums.
    """

    modality: ClassVar[str]
    by_position: ClassVar[bool]

    def problems_with(self, data: Any) -> Iterable[Problem]:
        """What is wrong between the task and the data, with whole paths (`task.x`, `data.y`)."""
        return ()

    def problems_of_shard(self, positions: int) -> Iterable[Problem]:
        """What is wrong between the task and what one device has of a sequence, with whole paths."""
        return ()

    def batch(self, data: Any, global_batch: int, *, validation: bool = False) -> dict[str, Field]:
        """The arrays of one global batch; those of a validation one always have `weights`."""
        ...

    def finish(
        self, model: Any, x: jax.Array, batch: Mapping[str, jax.Array], /
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The differentiable loss and named sums over the batch, from the stream after the last layer.

        All are float32 scalars, unreduced over the mesh axes that the batch is spread over. `sums["loss"]` and
        `sums["weight"]` are always there. All others are logged as means: divided by the weight, like the gradient.
        """
        ...

    def scores(self, sums: Mapping[str, float], validation: Any) -> dict[str, float]:
        """Returns the metrics of an evaluation, `loss` first, from sums over all batches and the validation samples."""
        ...

    def derived(self, units: int, params: int) -> dict[str, tuple[float, str]]:
        """Numbers that are of interest for this task alone, with their unit: from all units seen, and parameters."""
        return {}


def loss(task: Task, model: Model, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss that training minimises, summed over the batch, and all sums: those of the task and of the layers."""
    x, stats = model.apply_layers(model.embed(batch), batch)
    total, sums = task.finish(model, x, batch)
    aux_loss = model.aux_loss(stats)
    return total if aux_loss is None else total + aux_loss, {**sums, **stats}
