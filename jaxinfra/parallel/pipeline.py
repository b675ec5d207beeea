"""The engine that runs a pipeline schedule: forward and backward passes of all stages, tick by tick.

The stages of a pipeline are rows of the batch. In a tick every stage works on a microbatch of its own, and
activations are `[S * B, ...]` with rows over `(stage, replica, fsdp, ...)`; the weights of a layer are `[S, ...]`, that
layer of each stage. So the model that runs here is the one that runs without a pipeline, every other axis keeps its
meaning, and a tick is one program without branches: a stage that idles computes zeros while it would wait.

The head and the loss belong to the last stage alone. Its output is spread over the stages, by rows or by positions,
and all of them work on it: a vocabulary costs each stage its part. The embedding is looked up where it is needed.

Nothing is differentiated through the schedule. A forward pass keeps the input of its chunk; the backward pass
computes the chunk again and pulls one gradient back. Gradients of weights add up where the weights are, as partial
sums over `replica` and, of embedding and head, over `stage`: both are crossed once, after the last tick.

Shape suffixes: M microbatches, S stages, B rows of a microbatch, V chunks a stage, L layers of a chunk.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxinfra.parallel.schedules import IDLE, PassTable, PipelineSchedule
from jaxinfra.parallel.sharding import axis_names, unreduced_zeros

type Tree = Any
type Batch = Mapping[str, jax.Array]


class PipelineModel(Protocol):
    """What passes through the stages: functions of parameters that are arguments, never closed over."""

    def embed(self, shared: Tree, rows: Batch) -> jax.Array:
        """The stream before the first layer, for the rows of every stage."""
        ...

    def apply_layers(self, weights: Tree, x: jax.Array, rows: Batch, numbers: jax.Array) -> tuple[jax.Array, Tree]:
        """The stream after a chunk of each stage, and what its layers count (`[L, S, ...]`).

        `numbers` `[L, S]` says which layers they are; -1 is none.
        """
        ...

    def loss(self, shared: Tree, x: jax.Array, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss and sums of one microbatch, spread as `scatter_last_output` spreads it."""
        ...

    def aux_loss(self, stats: Tree) -> jax.Array | None:
        """What layers add to the loss, from what they count."""
        ...


@dataclass(frozen=True, kw_only=True)
class LossSharding:
    """How the output of the last stage is spread over the stages for head and loss.

    Attributes:
        dim: 0 for its rows, 1 for its positions.
        spec: the sharding of a `[B, T, D]` stream there.
    """

    dim: int
    spec: PartitionSpec


class Row(NamedTuple):
    """One tick of a part, by stage: `[S]` arrays (see `schedules.PassTable`)."""

    microbatch: jax.Array
    chunk: jax.Array
    slot: jax.Array


class Carry(NamedTuple):
    """What goes from tick to tick.

    Attributes:
        up: what each stage was sent by the one before.
        down: the gradient that each stage was sent by the one after.
        inputs: inputs of chunks that wait for their backward pass, `[slots, S * B, ...]`.
        pulled: gradients of outputs that wait for the gradients of weights, where those are apart.
        weights: gradients of the layers' weights.
        shared: gradients of all others.
        sums: sums of the loss.
        stats: what layers count, `[V, L, S, ...]`.
    """

    up: jax.Array
    down: jax.Array
    inputs: jax.Array
    pulled: jax.Array | None
    weights: Tree
    shared: Tree
    sums: dict[str, jax.Array]
    stats: Tree


# What happens between rows: each a function on the devices' own parts.


def _spec(x: jax.Array) -> PartitionSpec:
    return jax.typeof(x).sharding.spec


def _per_device(fun: Callable[..., jax.Array], out: PartitionSpec, *arrays: jax.Array) -> jax.Array:
    return jax.shard_map(fun, in_specs=tuple(_spec(a) for a in arrays), out_specs=out)(*arrays)


def rows_of_stages(part: Any) -> tuple[str, ...]:
    """The mesh axes of rows of all stages, from those of the rows of one."""
    return ("stage", *axis_names(part))


def select_microbatch(field_MB: jax.Array, microbatch_S: jax.Array) -> jax.Array:
    """The rows of each stage's microbatch, `[S * B, ...]`; those of the first where a stage idles."""
    parts = list(_spec(field_MB).partitions)

    def own(field: jax.Array, microbatch: jax.Array) -> jax.Array:
        return _at(jax.lax.pcast(field, ("stage",), to="varying"), microbatch)

    return _per_device(own, PartitionSpec(rows_of_stages(parts[1]), *parts[2:]), field_MB, microbatch_S)


def recv_activation(started: jax.Array, sent: jax.Array, row: Row) -> jax.Array:
    """The input of each stage's chunk: what begins there, what the stage before sent, or zeros where it idles."""

    def own(started: jax.Array, sent: jax.Array, microbatch: jax.Array, chunk: jax.Array) -> jax.Array:
        first = (jax.lax.axis_index("stage") == 0) & (chunk[0] == 0)
        return jnp.where(microbatch[0] == IDLE, 0, jnp.where(first, started, sent))

    return _per_device(own, _spec(sent), started, sent, row.microbatch, row.chunk)


def recv_grad(finished: jax.Array, sent: jax.Array, row: Row, chunks: int) -> jax.Array:
    """The gradient of the output of each stage's chunk: that of the loss, what the stage after sent, or zeros."""

    def own(finished: jax.Array, sent: jax.Array, microbatch: jax.Array, chunk: jax.Array) -> jax.Array:
        last = (jax.lax.axis_index("stage") == jax.lax.axis_size("stage") - 1) & (chunk[0] == chunks - 1)
        return jnp.where(microbatch[0] == IDLE, 0, jnp.where(last, finished, sent))

    return _per_device(own, _spec(sent), finished, sent, row.microbatch, row.chunk)


def send_to_stage(x: jax.Array, by: int) -> jax.Array:
    """What each stage is sent by the one `by` before it, round the ring."""

    def own(x: jax.Array) -> jax.Array:
        stages = jax.lax.axis_size("stage")
        return jax.lax.ppermute(x, "stage", [(s, (s + by) % stages) for s in range(stages)])

    return _per_device(own, _spec(x), x)


def scatter_last_output(x: jax.Array, done: jax.Array, spread: LossSharding) -> jax.Array:
    """The rows of the last stage, spread over all; zeros where it is not `done` with a microbatch."""
    # Positions that are sharded between blocks come together first, so that stages take parts of whole sequences.
    before = PartitionSpec(rows_of_stages(without_stage(spread.spec.partitions[0])), *_whole(spread))
    x = jax.reshard(x, before)

    def own(x: jax.Array, done: jax.Array) -> jax.Array:
        mine = (jax.lax.axis_index("stage") == jax.lax.axis_size("stage") - 1) & done
        x = jnp.where(mine, x, 0)
        return jax.lax.psum_scatter(x, "stage", scatter_dimension=spread.dim, tiled=True)

    return _per_device(own, spread.spec, x, done)


def without_stage(part: Any) -> tuple[str, ...]:
    """The other mesh axes that a dimension is spread over."""
    return tuple(axis for axis in axis_names(part) if axis != "stage")


def _whole(spread: LossSharding) -> tuple[Any, ...]:
    return tuple(without_stage(part) or None for part in spread.spec.partitions[1:])


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
    """The part of this stage's number; the first where it idles."""
    return jax.lax.dynamic_index_in_dim(x, jnp.maximum(index[0], 0), keepdims=False)


def read(waiting: jax.Array, slot_S: jax.Array) -> jax.Array:
    """The slot of each stage, `[S * B, ...]`."""
    return _per_device(_at, PartitionSpec(*_spec(waiting).partitions[1:]), waiting, slot_S)


def write(waiting: jax.Array, x: jax.Array, slot_S: jax.Array) -> jax.Array:
    """The slots with `x` in that of each stage, where it does not idle."""

    def own(waiting: jax.Array, x: jax.Array, slot: jax.Array) -> jax.Array:
        at = jnp.maximum(slot[0], 0)
        kept = jax.lax.dynamic_index_in_dim(waiting, at, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(waiting, jnp.where(slot[0] == IDLE, kept, x), at, 0)

    return _per_device(own, _spec(waiting), waiting, x, slot_S)


def select_chunk(stacked: jax.Array, chunk_S: jax.Array) -> jax.Array:
    """`[V, L, S, ...]` to `[L, S, ...]`: the chunk of each stage."""
    spec = _spec(stacked)
    out = spec.update(partitions=spec.partitions[1:])
    if stacked.shape[0] == 1:
        return stacked.reshape(stacked.shape[1:], out_sharding=out)
    return _per_device(_at, out, stacked, chunk_S)


def add(total: jax.Array, value: jax.Array, chunk_S: jax.Array) -> jax.Array:
    """`[V, L, S, ...]` plus `[L, S, ...]` at the chunk of each stage."""
    if total.shape[0] == 1:
        return total + value.reshape(total.shape, out_sharding=_spec(total))

    def own(total: jax.Array, value: jax.Array, chunk: jax.Array) -> jax.Array:
        return total.at[jnp.maximum(chunk[0], 0)].add(value)

    return _per_device(own, _spec(total), total, value, chunk_S)


def mask_idle(x: jax.Array, microbatch_S: jax.Array) -> jax.Array:
    """Anything that is spread over the stages, with zeros on those that idle."""
    return _per_device(lambda x, microbatch: jnp.where(microbatch[0] == IDLE, 0, x), _spec(x), x, microbatch_S)


# A tick


class Pipeline:
    """A model on a schedule."""

    def __init__(
        self, model: PipelineModel, schedule: PipelineSchedule, loss_sharding: LossSharding, numbers: np.ndarray
    ):
        """Binds what a step needs; the numbers are those of the layers of every chunk, `[V, L, S]`, -1 for none."""
        self.model, self.schedule, self.loss_sharding, self.numbers = model, schedule, loss_sharding, numbers

    def gradients(
        self, weights: Tree, shared: Tree, batch: Batch
    ) -> tuple[tuple[Tree, Tree], dict[str, jax.Array], Tree]:
        """Float32 gradients of the summed loss of all microbatches, its sums, and what layers count, `[V, L, S, ...]`.

        Args:
            weights: of the layers, `[V, L, S, ...]`, marked as reduced where their gradients stay partial sums.
            shared: all others, marked likewise, over `stage` too.
            batch: fields `[M, B, ...]`.
        """
        carry = self._empty(weights, shared, batch, train=True)
        carry = self._run(self.schedule.parts, carry, weights, shared, batch)
        return (carry.weights, carry.shared), carry.sums, carry.stats

    def evaluate(self, weights: Tree, shared: Tree, batch: Batch) -> tuple[dict[str, jax.Array], Tree]:
        """Sums of the loss of all microbatches, and what layers count; see `gradients`."""
        carry = self._empty(weights, shared, batch, train=False)
        carry = self._run((self.schedule.forward,), carry, weights, shared, batch)
        return carry.sums, carry.stats

    def _run(self, parts: tuple[PassTable, ...], carry: Carry, weights: Tree, shared: Tree, batch: Batch) -> Carry:
        """All ticks: one loop for each run of ticks that have the same parts."""
        works = (self._forward, self._backward, self._weights)
        if len(parts) == 1:
            works = (self._evaluate,)
        for begin, end, runs in _stretches(parts):
            rows = [
                Row(*(_by_stage(a[begin:end]) for a in (part.microbatch, part.chunk, part.slot)))
                for part, on in zip(parts, runs, strict=True)
                if on
            ]
            works_now = [work for work, on in zip(works, runs, strict=False) if on]

            def tick(carry: Carry, rows: list[Row], works=works_now) -> tuple[Carry, None]:
                for work, row in zip(works, rows, strict=True):
                    carry = work(carry, row, weights, shared, batch)
                return carry, None

            carry, _ = jax.lax.scan(tick, carry, rows)
        return carry

    def _inputs(self, carry: Carry, row: Row, shared: Tree, batch: Batch) -> tuple[Batch, jax.Array]:
        rows = {name: select_microbatch(field, row.microbatch) for name, field in batch.items()}
        return rows, recv_activation(self.model.embed(shared, rows), carry.up, row)

    def _forward(self, carry: Carry, row: Row, weights: Tree, shared: Tree, batch: Batch) -> Carry:
        """One chunk forward on every stage; its input is kept and its output sent up."""
        rows, x = self._inputs(carry, row, shared, batch)
        y, _ = self.model.apply_layers(self._taken(weights, row), x, rows, self._numbers(row))
        return carry._replace(up=send_to_stage(y, 1), inputs=write(carry.inputs, x, row.slot))

    def _evaluate(self, carry: Carry, row: Row, weights: Tree, shared: Tree, batch: Batch) -> Carry:
        """One chunk forward on every stage, and the loss of the microbatch that leaves the last one."""
        rows, x = self._inputs(carry, row, shared, batch)
        y, stats = self.model.apply_layers(self._taken(weights, row), x, rows, self._numbers(row))
        stats = jax.tree.map(lambda c: mask_idle(c, row.microbatch), stats)
        _, sums = self._loss(shared, y, row, batch)
        return carry._replace(up=send_to_stage(y, 1), **self._add_sums(carry, row, sums, stats))

    def _chunk(
        self, weights: Tree, shared: Tree, x: jax.Array, rows: Batch, row: Row
    ) -> tuple[tuple[jax.Array, jax.Array | None], Tree]:
        """One chunk of every stage as it is differentiated: `((output, aux_loss), stats)`."""
        x = recv_activation(self.model.embed(shared, rows), x, row)
        y, stats = self.model.apply_layers(weights, x, rows, self._numbers(row))
        stats = jax.tree.map(lambda c: mask_idle(c, row.microbatch), stats)
        return (y, self.model.aux_loss(stats)), stats

    def _backward(self, carry: Carry, row: Row, weights: Tree, shared: Tree, batch: Batch) -> Carry:
        """One chunk backward on every stage; the gradient of its input is sent down."""
        rows = {name: select_microbatch(field, row.microbatch) for name, field in batch.items()}
        x, own = read(carry.inputs, row.slot), self._taken(weights, row)
        apart = self.schedule.weights is not None
        fixed, moved = ((own,), (shared, x)) if apart else ((), (own, shared, x))
        chunk = partial(self._chunk, *fixed, rows=rows, row=row)
        (y, aux_loss), pull, stats = jax.vjp(chunk, *moved, has_aux=True)
        total, pull_loss, sums = jax.vjp(lambda s, y: self._loss(s, y, row, batch), shared, y, has_aux=True)
        of_loss, dy = pull_loss(_one_like(total))
        dy = recv_grad(dy, carry.down, row, self.schedule.chunks)
        *of_weights, of_embedding, dx = pull((dy, None if aux_loss is None else _one_like(aux_loss)))
        carry = carry._replace(
            down=send_to_stage(dx, -1),
            shared=_plus(_plus(carry.shared, of_loss), of_embedding),
            **self._add_sums(carry, row, sums, stats),
        )
        if apart:
            assert carry.pulled is not None
            return carry._replace(pulled=write(carry.pulled, dy, row.slot))
        return carry._replace(weights=self._added(carry.weights, of_weights[0], row))

    def _weights(self, carry: Carry, row: Row, weights: Tree, shared: Tree, batch: Batch) -> Carry:
        """The gradients of the weights of one chunk of every stage, from what its backward pass left."""
        assert carry.pulled is not None
        rows = {name: select_microbatch(field, row.microbatch) for name, field in batch.items()}
        x, dy = read(carry.inputs, row.slot), mask_idle(read(carry.pulled, row.slot), row.microbatch)
        chunk = partial(self._chunk, shared=shared, x=x, rows=rows, row=row)
        (_, aux_loss), pull, _ = jax.vjp(chunk, self._taken(weights, row), has_aux=True)
        (found,) = pull((dy, None if aux_loss is None else _one_like(aux_loss)))
        return carry._replace(weights=self._added(carry.weights, found, row))

    def _loss(self, shared: Tree, y: jax.Array, row: Row, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss and sums of the microbatch that leaves the last stage; zero if none does."""
        microbatch, chunk = (jax.reshard(a, PartitionSpec())[-1] for a in (row.microbatch, row.chunk))
        done = (microbatch != IDLE) & (chunk == self.schedule.chunks - 1)
        index = jnp.maximum(microbatch, 0)
        fields = {name: jax.lax.dynamic_index_in_dim(field, index, keepdims=False) for name, field in batch.items()}
        total, sums = self.model.loss(shared, scatter_last_output(y, done, self.loss_sharding), fields)
        return _if(done, total), {name: _if(done, value) for name, value in sums.items()}

    # Small things

    def _numbers(self, row: Row) -> jax.Array:
        numbers = jax.reshard(jnp.asarray(self.numbers, jnp.int32), PartitionSpec(None, None, "stage"))
        return select_chunk(numbers, row.chunk)

    @staticmethod
    def _taken(weights: Tree, row: Row) -> Tree:
        return jax.tree.map(lambda w: select_chunk(w, row.chunk), weights)

    @staticmethod
    def _added(total: Tree, value: Tree, row: Row) -> Tree:
        return jax.tree.map(lambda t, v: add(t, v.astype(t.dtype), row.chunk), total, value)

    def _add_sums(self, carry: Carry, row: Row, sums: dict[str, jax.Array], stats: Tree) -> dict[str, Any]:
        return {"sums": _plus(carry.sums, sums), "stats": self._added(carry.stats, stats, row)}

    def _empty(self, weights: Tree, shared: Tree, batch: Batch, *, train: bool) -> Carry:
        """Zeros for everything that goes from tick to tick."""
        idle = np.full((1, self.schedule.stages), IDLE, np.int32)
        row = jax.tree.map(lambda a: a[0], Row(*(_by_stage(idle),) * 3))

        def shapes(weights: Tree, shared: Tree, batch: Batch) -> tuple[Any, ...]:
            rows = {name: select_microbatch(field, row.microbatch) for name, field in batch.items()}
            x = self.model.embed(shared, rows)
            y, stats = self.model.apply_layers(self._taken(weights, row), x, rows, self._numbers(row))
            _, sums = self._loss(shared, y, row, batch)
            return x, sums, stats

        x, sums, stats = jax.eval_shape(shapes, weights, shared, batch)
        slots = jax.ShapeDtypeStruct((self.schedule.num_slots, *x.shape), x.dtype)
        waiting = partial(_zeros, slots, PartitionSpec(None, *x.sharding.spec.partitions))
        stacked = jax.tree.map(lambda c: _zeros_stacked(c, self.schedule.chunks), stats)
        return Carry(
            up=_zeros(x, x.sharding.spec),
            down=_zeros(x, x.sharding.spec),
            inputs=waiting(),
            pulled=waiting() if train and self.schedule.weights is not None else None,
            weights=jax.tree.map(_zero_gradient, weights) if train else None,
            shared=jax.tree.map(_zero_gradient, shared) if train else None,
            sums=jax.tree.map(lambda s: _zeros(s, s.sharding.spec), sums),
            stats=stacked,
        )


def _stretches(parts: tuple[PassTable, ...]) -> Iterator[tuple[int, int, tuple[bool, ...]]]:
    """Runs of ticks with the same parts, `(begin, end, which parts)`."""
    runs = [tuple(bool(part.runs[tick]) for part in parts) for tick in range(len(parts[0].microbatch))]
    begin = 0
    for which, ticks in itertools.groupby(runs):
        end = begin + len(list(ticks))
        if any(which):
            yield begin, end, which
        begin = end


def _by_stage(table: np.ndarray) -> jax.Array:
    """`[ticks, S]` with every stage's column on that stage."""
    return jax.reshard(jnp.asarray(table, jnp.int32), PartitionSpec(None, "stage"))


def _zeros(like: Any, spec: PartitionSpec) -> jax.Array:
    return unreduced_zeros(like.shape, like.dtype, spec)


def _zeros_stacked(like: Any, chunks: int) -> jax.Array:
    spec = like.sharding.spec
    return unreduced_zeros((chunks, *like.shape), like.dtype, spec.update(partitions=(None, *spec.partitions)))


def _zero_gradient(weight: jax.Array) -> jax.Array:
    """A float32 zero that gradients of this weight can be added to: a partial sum over what it is reduced over."""
    spec = PartitionSpec(*_spec(weight).partitions, unreduced=_spec(weight).reduced)
    return unreduced_zeros(weight.shape, jnp.dtype("float32"), spec)


def _one_like(total: jax.Array) -> jax.Array:
    return jnp.ones((), total.dtype, out_sharding=PartitionSpec(reduced=_spec(total).unreduced))


def _if(condition: jax.Array, total: jax.Array) -> jax.Array:
    """`total`, a partial sum, or zero."""
    factor = jax.reshard(condition.astype(total.dtype), PartitionSpec(reduced=_spec(total).unreduced))
    return total * factor


def _plus(total: Tree, value: Tree) -> Tree:
    return jax.tree.map(lambda t, v: t + v.astype(t.dtype), total, value)
