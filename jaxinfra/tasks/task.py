"""What `Program` asks of a task: a description of the batch, and a loss that is a sum."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfra.parallel.layout import Names


@dataclass(frozen=True, kw_only=True)
class Field:
    """One array of a batch: its global shape, dtype and logical axes."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: Names


class Model(Protocol):
    """What a model offers to tasks and pipelines: a stream of activations that passes a stack of like layers.

    `blocks` holds the parameters of the layers, stacked; a model that is merged with the parameters of some layers
    alone has those.
    """

    blocks: nnx.Module

    def begin(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """The stream before the first layer."""
        ...

    def layers(
        self, x: jax.Array, batch: Mapping[str, jax.Array], numbers: Any = None, /
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The stream after the layers in `blocks`, and what they count, one row a layer."""
        ...

    def penalty(self, sums: dict[str, jax.Array]) -> jax.Array | None:
        """What layers add to the loss, from what they count."""
        ...


class Task(Protocol):
    """A task over batches of named arrays."""

    @property
    def by_position(self) -> bool:
        """Whether `finish` needs no more of the stream than a position at a time, but for its sums."""
        ...

    def batch(self, data: Any, global_batch: int) -> dict[str, Field]:
        """The arrays of one global batch."""
        ...

    def finish(
        self, model: Any, x: jax.Array, batch: Mapping[str, jax.Array], /
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The differentiable loss and named sums over the batch, from the stream after the last layer.

        All are float32 scalars, unreduced over the mesh axes that the batch is spread over. `sums["loss"]` and
        `sums["weight"]` are always there: their quotient is the mean loss, and the gradient is divided by the weight.
        """
        ...

    def tokens(self, data: Any, global_batch: int) -> int:
        """Tokens (or samples, where there are no tokens) of one global batch."""
        ...


def loss(task: Task, model: Model, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss that training minimises, summed over the batch, and all sums: those of the task and of the layers."""
    x, counted = model.layers(model.begin(batch), batch)
    total, sums = task.finish(model, x, batch)
    penalty = model.penalty(counted)
    return total if penalty is None else total + penalty, {**sums, **counted}
