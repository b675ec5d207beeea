"""`GradientEngine`: computes the gradients and the sums over a global batch. A `Program` has one, chosen by its config.

    config                       engine
    neither of the below         PlainEngine, here: all devices compute each microbatch together
    mesh.stage above 1           PipelineEngine: stages pass microbatches on
    train.canonical=N            CanonicalEngine: each device computes virtual shards by itself, and adds them in order

In JAX an *unreduced* array is a partial sum on each device; a *reduced* one is replicated, with *unreduced* gradients.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, override

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxinfra.models.module import LayerStats
from jaxinfra.parallel.sharding import Partitioner, unreduced_zeros
from jaxinfra.parallel.spec import Params, PyTree, select_trainable
from jaxinfra.program.loss import Batch, ModelLoss, Sums

type Function = Callable[..., Any]


class Gradients(NamedTuple):
    """Gradients over a batch.

    Attributes:
        grads: gradients of the trained parameters, float32, sharded like them.
        sums: sums of the objective.
        stats: statistics of the layers.
        digests: of what was computed on the way, by name (`parallel.canonical.DIGESTS`); {} without them.
    """

    grads: Params
    sums: Sums
    stats: LayerStats
    digests: dict[str, jax.Array] = {}


class GradientEngine(ABC):
    """How a global batch is split, computed and added up.

    Args:
        loss: computes the loss of a part of a batch.
        partitioner: maps logical axes to shardings.
        stored: the `PartitionSpec` of every stored parameter, a nested dict.
    """

    def __init__(self, loss: ModelLoss, partitioner: Partitioner, stored: PyTree) -> None:
        self.loss, self.partitioner, self.stored = loss, partitioner, stored
        self.run, self.specs = loss.run, loss.specs

    @property
    def num_row_shards(self) -> int:
        """Number of parts into which the mesh splits the rows of a batch."""
        return self.partitioner.num_shards("batch")

    def batch_spec(self, *names: str | None) -> PartitionSpec:
        """Returns the sharding of an array of a batch whose dimensions after the rows have these logical axes."""
        return self.partitioner.spec("batch", *names)

    def make_params(self, make: Callable[[jax.Array, PyTree], Params], key: jax.Array) -> Params:
        """Returns `make(key, shardings)`: the initial parameters, sharded as they are stored."""
        return make(key, self.stored)

    @abstractmethod
    def gradients(self, params: Params, batch: Batch, reference: Params | None) -> Gradients:
        """Returns the gradients of the loss summed over a batch, which is in shard order (see `parallel.context`)."""

    @abstractmethod
    def sums(self, params: Params, batch: Batch, reference: Params | None, of: Function) -> Sums:
        """Returns the sums `of(params, batch, reference)` over a batch, which is in shard order."""

    def mean(self, grads: Params, weight: jax.Array) -> Params:
        """Divides summed gradients by the weight of the batch."""
        scale = 1.0 / jnp.maximum(weight, 1.0)
        return jax.tree.map(lambda g: g * scale, grads)

    def with_exact_rounding(self, clip: Function, update: Function, grads: Params) -> tuple[Function, Function]:
        """Returns the functions that clip gradients and update the state, unchanged unless an engine fixes rounding."""
        return clip, update


class PlainEngine(GradientEngine):
    """All devices compute each microbatch together.

    For each microbatch, weights are all-gathered over `fsdp` layer by layer. Their gradients are reduce-scattered, and
    added to a buffer that is a partial sum over `replica`. After the last microbatch one all-reduce completes it.
    """

    @override
    def gradients(self, params: Params, batch: Batch, reference: Params | None) -> Gradients:
        if self.loss.module.partial_gradients:  # *reduced* parameters keep their gradients partial sums until the end
            params = jax.tree.map(lambda p, s: jax.reshard(p, self.partitioner.with_reduced(s)), params, self.stored)
        if self.run.train.accumulate == 1:
            sums, stats, grads = self.loss.with_gradients(params, batch, reference)
        else:
            microbatches = split_microbatches(batch, self.run.train.accumulate)
            # `eval_shape` and the scan share one trace, which jit remembers; `inline` leaves no call in the program.
            traced = jax.jit(self.loss.with_gradients, inline=True)
            step = partial(traced, params, reference=reference)
            shapes = jax.eval_shape(step, jax.tree.map(lambda x: x[0], microbatches))
            # Starting from zeros, not from the first microbatch, compiles the model once, inside the loop.
            zeros = jax.tree.map(lambda a: unreduced_zeros(a.shape, a.dtype, a.sharding.spec), shapes)
            (sums, stats, grads), _ = jax.lax.scan(
                lambda total, microbatch: (jax.tree.map(jnp.add, total, step(microbatch)), None),
                zeros,
                microbatches,
                unroll=self.partitioner.unroll_loops,
            )
        sums, stats = jax.tree.map(lambda s: jax.reshard(s, PartitionSpec()), (sums, stats))
        return Gradients(jax.tree.map(jax.reshard, grads, select_trainable(self.stored, self.specs)), sums, stats)

    @override
    def sums(self, params: Params, batch: Batch, reference: Params | None, of: Function) -> Sums:
        return jax.tree.map(lambda s: jax.reshard(s, PartitionSpec()), of(params, batch, reference))


def split_microbatches(batch: Batch, count: int) -> Batch:
    """Reshapes a batch to `[microbatches, rows, ...]`; of 2 microbatches the first has rows 0, 2, 4 and so on.

    With this order no row leaves its device.
    """
    return {name: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0) for name, x in batch.items()}
