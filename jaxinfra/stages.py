"""How the model of a run is cut into pipeline stages, and its step made of `parallel.pipeline`.

The train state knows nothing of stages: stacked layers are `[layers, ...]` whatever the schedule, so a checkpoint fits
any number of them. A step lays the layers out as `[chunks, layers of a chunk, stages, ...]` before its first tick,
and their gradients back after its last. Where the stages hold consecutive layers of equal number, that moves
nothing; otherwise each weight crosses `stage` once and its gradient once, whatever the number of microbatches.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from jaxinfra.models.model import StageLayers
from jaxinfra.parallel.pipeline import LossSharding, Pipeline, without_stage
from jaxinfra.parallel.sharding import Partitioner

if TYPE_CHECKING:
    from jaxinfra.run import Run

type Batch = Mapping[str, jax.Array]
STACKED = "blocks"
"""The parameters that are stacked over layers and spread over stages."""


def layer_numbers(layers: int, stages: int, chunks: int) -> np.ndarray:
    """Which layers each chunk of each stage has: `[chunks, layers of a chunk, stages]`, -1 for none.

    Chunks stand in the order of the model: chunk c of stage s at place `c * stages + s`. Where places do not divide
    the layers, the first ones have one more than the others.
    """
    parts = np.array_split(np.arange(layers), stages * chunks)
    longest = len(parts[0])
    numbers = [np.pad(part, (0, longest - len(part)), constant_values=-1) for part in parts]
    return np.reshape(numbers, (chunks, stages, longest)).transpose(0, 2, 1)


class Stages:
    """The stages of a run: a `pipeline.PipelineModel`, and the step that it makes."""

    def __init__(self, run: "Run", partitioner: Partitioner, specs: Any, stored: Any):
        """Builds the model twice: for the rows of all stages, and for its end, spread over them.

        The partitioner is that of a run without stages; `specs` and `stored` are those of every parameter.
        """
        self.run, self.partitioner, self.specs, self.stored = run, partitioner, specs, stored
        rules, self.stages, self.chunks = partitioner.rules, partitioner.mesh.stage, run.pipeline.chunks
        dim = run.loss_sharded_dim()
        assert dim is not None, "validate the run first"
        spread = {"batch": (*rules.batch, "stage")} if dim == 0 else {"sequence": (*rules.sequence, "stage")}
        self.at_end = replace(partitioner, rules=replace(rules, block_sequence=(), **spread))
        in_rows = replace(partitioner, rules=replace(rules, batch=("stage", *rules.batch)))
        self._rows, self._end = (nnx.split(run.model.build(one))[0] for one in (in_rows, self.at_end))
        numbers = layer_numbers(run.model.layers, self.stages, self.chunks)
        self.places, self.longest = self.stages * self.chunks, numbers.shape[1]
        # So many places have that many layers, all others one less.
        self.full = run.model.layers - self.places * (self.longest - 1)
        self._uniform = run.model.uniform(numbers)
        schedule = run.pipeline.make_schedule(self.stages, run.train.accumulate)
        where = LossSharding(dim=dim, spec=self.at_end.spec("batch", "sequence", None))
        self.pipeline = Pipeline(self, schedule, where, numbers)

    # The model, as the pipeline calls it

    def _merged(self, graphdef: Any, params: dict[str, Any]) -> Any:
        return nnx.merge(graphdef, nnx.State({**self.specs, **params}))

    def embed(self, shared: Any, rows: Batch) -> jax.Array:
        """See `pipeline.PipelineModel`."""
        return self._merged(self._rows, shared).embed(rows)

    def apply_layers(self, weights: Any, x: jax.Array, rows: Batch, numbers: jax.Array) -> tuple[jax.Array, Any]:
        """See `pipeline.PipelineModel`."""
        model = self._merged(self._rows, {STACKED: weights})
        return model.apply_layers(x, rows, StageLayers(numbers, self._uniform))

    def loss(self, shared: Any, x: jax.Array, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        """See `pipeline.PipelineModel`."""
        fields = self.run.parts.task.batch(self.run.data, self.run.train.global_batch, validation=True)
        batch = {n: jax.reshard(batch[n], self.at_end.spec(*f.axes)) for n, f in fields.items() if n in batch}
        return self.run.parts.task.finish(self._merged(self._end, shared), x, batch)

    def aux_loss(self, stats: Any) -> jax.Array | None:
        """See `pipeline.PipelineModel`."""
        return self._merged(self._rows, {}).aux_loss(stats)

    # A step

    def gradients(self, params: Any, batch: Batch) -> tuple[Any, dict[str, jax.Array]]:
        """Gradients of the summed loss, as parameters are stored, and all sums; `batch` is in microbatches."""
        (weights, shared), sums, stats = self.pipeline.gradients(*self._laid_out(params), batch)
        shared = jax.tree.map(self._scattered, shared, self._of_shared(self.stored))
        return {**shared, STACKED: self._laid_back(weights)}, self._sums(sums, stats)

    def evaluate(self, params: Any, batch: Batch) -> dict[str, jax.Array]:
        """All sums; `batch` is in microbatches."""
        return self._sums(*self.pipeline.evaluate(*self._laid_out(params), batch))

    def _sums(self, sums: dict[str, jax.Array], stats: dict[str, jax.Array]) -> dict[str, jax.Array]:
        stats = {name: self._joined(jax.reshard(a, PartitionSpec())) for name, a in stats.items()}
        return {**{name: jax.reshard(a, PartitionSpec()) for name, a in sums.items()}, **stats}

    @staticmethod
    def _of_shared(tree: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in tree.items() if name != STACKED}

    def _laid_out(self, params: Any) -> tuple[Any, Any]:
        """Weights of the layers by stage, and all others whole on every stage; gradients of both stay partial sums."""
        shared = jax.tree.map(
            lambda p, s: jax.reshard(p, self.partitioner.with_reduced(_of_any_stage(s), "stage")),
            self._of_shared(params),
            self._of_shared(self.stored),
        )
        weights = jax.tree.map(
            lambda p, s: jax.reshard(self._split(p), self.partitioner.with_reduced(self._staged(s))),
            params[STACKED],
            self.stored[STACKED],
        )
        return weights, shared

    def _scattered(self, grad: jax.Array, stored: PartitionSpec) -> jax.Array:
        """A partial sum over `replica` and `stage` as it is stored: over `stage` first, so that a part crosses."""
        axes = jax.typeof(grad).sharding.spec.unreduced - {"stage"}
        return jax.reshard(jax.reshard(grad, stored.update(unreduced=axes)), stored)

    def _laid_back(self, grads: Any) -> Any:
        def back(g: jax.Array, stored: PartitionSpec) -> jax.Array:
            # Stacked layers can be joined as they are stored, wherever `stage` is there.
            return jax.reshard(self._joined(jax.reshard(g, PartitionSpec(None, None, *stored.partitions))), stored)

        return jax.tree.map(back, grads, self.stored[STACKED])

    def _staged(self, stored: PartitionSpec) -> PartitionSpec:
        """The sharding by stage of a stacked parameter that is stored like this."""
        return PartitionSpec(None, None, "stage", *_of_any_stage(stored).partitions[1:])

    def _split(self, stacked: jax.Array) -> jax.Array:
        """`[layers, ...]` to `[chunks, layers of a chunk, stages, ...]`, zeros for none."""
        places, longest, full, rest = self.places, self.longest, self.full, stacked.shape[1:]
        spec = jax.typeof(stacked).sharding.spec.partitions
        if full < places:
            head = stacked[: full * longest].reshape(full, longest, *rest, out_sharding=_places(spec))
            tail = stacked[full * longest :].reshape(places - full, longest - 1, *rest, out_sharding=_places(spec))
            tail = jnp.pad(tail, [(0, 0), (0, 1), *[(0, 0)] * len(rest)])
            stacked = jnp.concatenate([head, tail])
        shape = (self.chunks, self.stages, longest, *rest)
        out = PartitionSpec(None, spec[0], None, *spec[1:])
        return jnp.moveaxis(stacked.reshape(shape, out_sharding=out), 1, 2)

    def _joined(self, laid: jax.Array) -> jax.Array:
        """The inverse of `_split`."""
        places, longest, full, rest = self.places, self.longest, self.full, laid.shape[3:]
        layers, spec = self.run.model.layers, jax.typeof(laid).sharding.spec.partitions
        laid = jnp.moveaxis(laid, 2, 1)
        if full == places:
            return laid.reshape(layers, *rest, out_sharding=PartitionSpec(spec[2], *spec[3:]))
        laid = laid.reshape(places, longest, *rest, out_sharding=PartitionSpec(None, None, *spec[3:]))
        flat = PartitionSpec(None, *spec[3:])
        head = laid[:full].reshape(full * longest, *rest, out_sharding=flat)
        tail = laid[full:, : longest - 1].reshape(layers - full * longest, *rest, out_sharding=flat)
        return jnp.concatenate([head, tail])


def _places(spec: tuple[Any, ...]) -> PartitionSpec:
    assert spec[0] is None, spec
    return PartitionSpec(None, None, *spec[1:])


def _of_any_stage(spec: PartitionSpec) -> PartitionSpec:
    """The sharding that is left when `stage` is taken from it."""
    return PartitionSpec(*(without_stage(part) or None for part in spec.partitions))
