"""Logits as a pair of factors, hidden states and head: multiplied, they are the largest array of a language model.

Shape suffixes: B batch, T length, D hidden size, V vocabulary.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfra.ops.dot import dot


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class FactoredLogits:
    """Hidden states and the head whose product are the logits `[B, T, V]`.

    Attributes:
        hidden: `[B, T, D]`, after the final norm, in the compute dtype.
        head: `[D, V]`, ready for use (see `Partitioner.gather_weight`).
        softcap: logits become `softcap * tanh(logits / softcap)` (Gemma 2); None leaves them.
        unroll_loops: whether loops over chunks of them are unrolled (see `mesh.needs_unrolled_loops`); a `Program` sets
            it in what a model returns.
        mtp_hidden: what modules for multi-token prediction return in place of `hidden`, one array for each depth.
    """

    hidden: jax.Array
    head: jax.Array
    softcap: float | None = field(default=None, metadata={"static": True})
    unroll_loops: bool = field(default=False, metadata={"static": True})
    mtp_hidden: tuple[jax.Array, ...] = ()

    def materialize(self) -> jax.Array:
        """Returns the logits, float32 `[B, T, V]`."""
        return softcapped(dot(self.hidden, self.head).astype(jnp.float32), self.softcap)


def with_unrolled_loops(output: Any, unroll_loops: bool) -> Any:
    """Returns the output of a model, which says how to loop over its chunks if it is `FactoredLogits`."""
    return replace(output, unroll_loops=unroll_loops) if isinstance(output, FactoredLogits) else output


def softcapped(logits: jax.Array, softcap: float | None) -> jax.Array:
    """Caps logits smoothly at `softcap`."""
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)
