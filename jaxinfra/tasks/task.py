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


class Sums(Protocol):
    """The keys that every task's sums have: `loss` and `weight`; others are the task's own."""

    def __getitem__(self, name: str, /) -> jax.Array: ...


class Task(Protocol):
    """A task over batches of named arrays."""

    def batch(self, data: Any, global_batch: int) -> dict[str, Field]:
        """The arrays of one global batch."""
        ...

    def loss(self, model: nnx.Module, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The differentiable loss and named sums over the batch.

        All are float32 scalars, unreduced over the mesh axes that the batch is spread over. `sums["loss"]` and
        `sums["weight"]` are always there: their quotient is the mean loss, and the gradient is divided by the weight.
        """
        ...

    def tokens(self, data: Any, global_batch: int) -> int:
        """Tokens (or samples, where there are no tokens) of one global batch."""
        ...
