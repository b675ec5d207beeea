"""Runs a pipeline schedule: forward and backward passes of all stages, tick by tick.

A chunk is a run of consecutive layers (Megatron's model chunk, or virtual stage); a stage holds one or more chunks.

The stages are rows of the batch. In a tick every stage works on its own microbatch: activations are `[S * B, ...]` with
rows over `(stage, replica, fsdp, ...)`, and the weights of a layer are `[S, ...]`, one layer of each stage. So the same
model runs with and without a pipeline, all other mesh axes keep their meaning, and a tick has no branches: an idle
stage computes zeros.

Only the last stage has an output for the head and the loss. It is scattered over the stages, by rows or by positions,
so that each computes its part of the logits. Every stage looks up embeddings for its own rows.

JAX does not differentiate through the schedule. A forward pass saves the input of its chunk; the backward pass
recomputes the chunk and its gradient. Weight gradients accumulate as partial sums over `replica` and, for embedding and
head, over `stage`: they are reduced once, after the last tick.

In JAX an *unreduced* array is a partial sum on each device; a *reduced* one is replicated, with *unreduced* gradients.

Shape suffixes: M microbatches, S stages, B rows of a microbatch, V chunks per stage, L layers of a chunk, T length,
D hidden size.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxinfra.parallel.schedules import IDLE, PassTable, PipelineSchedule
from jaxinfra.parallel.sharding import SpecEntry, axis_names, unit_cotangent, unreduced_zeros
from jaxinfra.parallel.spec import Batch, PyTree, Sums


class PipelineModel(Protocol):
    """The parts of a model, as functions of explicit parameters.

    `shared` holds all parameters except the weights of stacked layers. `batch` has the rows of every stage's
    microbatch, `[S * B, ...]`.
    """

    def embed(self, shared: PyTree, batch: Batch, /) -> jax.Array:
        """Returns the input of the first layer."""
        ...

    def apply_layers(self, weights: PyTree, x: jax.Array, batch: Batch, layers: jax.Array, /) -> tuple[jax.Array, Sums]:
        """Applies one chunk of each stage; `layers` `[L, S]` are the layers' indices, -1 is padding.

        Returns the output and the layers' statistics, `[L, S, ...]`.
        """
        ...

    def output_loss(self, shared: PyTree, x: jax.Array, batch: Batch, /) -> tuple[jax.Array, Sums]:
        """Returns the loss and sums of one microbatch; `x` comes from `scatter_last_output`."""
        ...

    def aux_loss(self, stats: Sums, /) -> jax.Array | None:
        """Returns the auxiliary loss of the layers' statistics, if there is one."""
        ...


class Tick(NamedTuple):
    """The work of each stage in one pass of a tick, a row of a `PassTable`: `[S]` arrays, sharded over the stages.

    A stage without work has `IDLE`.
    """

    microbatch: jax.Array
    chunk: jax.Array
    slot: jax.Array


class StepInputs(NamedTuple):
    """The inputs of all ticks of a step.

    Attributes:
        weights: the layers' weights, `[V, L, S, ...]`; *reduced* over the axes over which gradients stay unreduced.
        shared: all other parameters, reduced in the same way, also over `stage`.
        batch: fields `[M, B, ...]`.
    """

    weights: PyTree
    shared: PyTree
    batch: Batch


class Carry(NamedTuple):
    """The state between ticks.

    Attributes:
        activations: activations that each stage received from the previous stage, `[S * B, ...]`.
        grads: gradients that each stage received from the next stage, `[S * B, ...]`.
        saved_inputs: inputs of chunks, kept for the backward pass, `[slots, S * B, ...]`.
        saved_grads: gradients of chunks' outputs, kept for the weight gradients, `[slots, S * B, ...]`.
        weight_grads: gradients of the layers' weights, `[V, L, S, ...]`.
        shared_grads: gradients of all other parameters.
        sums: sums of the loss.
        stats: the layers' statistics, `[V, L, S, ...]`.
    """

    activations: jax.Array
    grads: jax.Array
    saved_inputs: jax.Array
    saved_grads: jax.Array | None
    weight_grads: PyTree
    shared_grads: PyTree
    sums: Sums
    stats: Sums


type PassFunction = Callable[[StepInputs, Carry, Tick], Carry]


# Operations on each device's own part: in a `shard_map`, `[S]` arrays have one entry, that of the device's stage


def _spec(x: jax.Array) -> PartitionSpec:
    return jax.typeof(x).sharding.spec


def _per_device(fun: Callable[..., jax.Array], out: PartitionSpec, *arrays: jax.Array) -> jax.Array:
    """Applies `fun` on each device to its own parts of the arrays; the result has the sharding `out`."""
    return jax.shard_map(fun, in_specs=tuple(_spec(a) for a in arrays), out_specs=out)(*arrays)


def without_stage(entry: SpecEntry) -> tuple[str, ...]:
    """Returns the mesh axes of a dimension other than `stage`."""
    return tuple(axis for axis in axis_names(entry) if axis != "stage")


def _select(x: jax.Array, index: jax.Array) -> jax.Array:
    """Selects the entry of `x` at this stage's index; the first entry if the stage is idle."""
    return jax.lax.dynamic_index_in_dim(x, jnp.maximum(index[0], 0), keepdims=False)


def select_microbatch(batch: Batch, microbatch_S: jax.Array) -> Batch:
    """Selects the rows of each stage's microbatch, `[S * B, ...]`; the first microbatch if a stage is idle."""

    def select(field: jax.Array, microbatch: jax.Array) -> jax.Array:
        return _select(jax.lax.pcast(field, ("stage",), to="varying"), microbatch)

    def select_field(field_MB: jax.Array) -> jax.Array:
        _, rows, *rest = list(_spec(field_MB).partitions)
        return _per_device(select, PartitionSpec(("stage", *axis_names(rows)), *rest), field_MB, microbatch_S)

    return {name: select_field(field) for name, field in batch.items()}


def receive(received: jax.Array, boundary: jax.Array, tick: Tick, *, stage: int, chunk: int) -> jax.Array:
    """Returns what each stage works on: what its neighbor sent, or zeros if the stage is idle.

    Only this `chunk` of this `stage` takes `boundary` instead: the first chunk of the model takes the embeddings, and
    in the backward pass the last chunk takes the gradient of the loss.
    """

    def select(received: jax.Array, boundary: jax.Array, microbatch: jax.Array, own_chunk: jax.Array) -> jax.Array:
        at_boundary = (jax.lax.axis_index("stage") == stage) & (own_chunk[0] == chunk)
        return jnp.where(microbatch[0] == IDLE, 0, jnp.where(at_boundary, boundary, received))

    return _per_device(select, _spec(received), received, boundary, tick.microbatch, tick.chunk)


def send_to_stage(x: jax.Array, offset: int) -> jax.Array:
    """Sends each stage's rows to the stage `offset` after it, around the ring."""

    def permute(x: jax.Array) -> jax.Array:
        stages = jax.lax.axis_size("stage")
        return jax.lax.ppermute(x, "stage", [(s, (s + offset) % stages) for s in range(stages)])

    return _per_device(permute, _spec(x), x)


def scatter_last_output(x: jax.Array, is_done: jax.Array, loss_spec: PartitionSpec) -> jax.Array:
    """Scatters the last stage's output over all stages for the loss; zeros if no microbatch is done in this tick."""
    scatter_dim = next(dim for dim, entry in enumerate(loss_spec.partitions) if "stage" in axis_names(entry))
    rows, *dims = (without_stage(entry) for entry in loss_spec.partitions)
    # All-gathers block positions first, so that stages get parts of whole sequences.
    x = jax.reshard(x, PartitionSpec(("stage", *rows), *(axes or None for axes in dims)))

    def scatter(x: jax.Array, is_done: jax.Array) -> jax.Array:
        is_last = jax.lax.axis_index("stage") == jax.lax.axis_size("stage") - 1
        x = jnp.where(is_last & is_done, x, 0)
        return jax.lax.psum_scatter(x, "stage", scatter_dimension=scatter_dim, tiled=True)

    return _per_device(scatter, loss_spec, x, is_done)


def read_slot(slots: jax.Array, slot_S: jax.Array) -> jax.Array:
    """Reads the slot of each stage, `[S * B, ...]`."""
    return _per_device(_select, PartitionSpec(*_spec(slots).partitions[1:]), slots, slot_S)


def write_slot(slots: jax.Array, x: jax.Array, slot_S: jax.Array) -> jax.Array:
    """Writes `x` to the slot of each stage that is not idle."""

    def write(slots: jax.Array, x: jax.Array, slot: jax.Array) -> jax.Array:
        value = jnp.where(slot[0] == IDLE, _select(slots, slot), x)
        return jax.lax.dynamic_update_index_in_dim(slots, value, jnp.maximum(slot[0], 0), 0)

    return _per_device(write, _spec(slots), slots, x, slot_S)


def select_chunk(tree: PyTree, chunk_S: jax.Array) -> PyTree:
    """Selects the chunk of each stage: `[V, L, S, ...]` to `[L, S, ...]`."""

    def select(x: jax.Array) -> jax.Array:
        spec = _spec(x)
        out = spec.update(partitions=spec.partitions[1:])
        if x.shape[0] == 1:  # the only chunk, without a copy
            return x.reshape(x.shape[1:], out_sharding=out)
        return _per_device(_select, out, x, chunk_S)

    return jax.tree.map(select, tree)


def add_to_chunk(total: PyTree, value: PyTree, chunk_S: jax.Array) -> PyTree:
    """Adds `value` `[L, S, ...]` to each stage's chunk in `total` `[V, L, S, ...]`, in the dtype of `total`."""

    def add_own(total: jax.Array, value: jax.Array, chunk: jax.Array) -> jax.Array:
        return total.at[jnp.maximum(chunk[0], 0)].add(value)

    def add(total: jax.Array, value: jax.Array) -> jax.Array:
        value = value.astype(total.dtype)
        if total.shape[0] == 1:
            return total + value.reshape(total.shape, out_sharding=_spec(total))
        return _per_device(add_own, _spec(total), total, value, chunk_S)

    return jax.tree.map(add, total, value)


def mask_idle[T](tree: T, microbatch_S: jax.Array) -> T:
    """Sets the parts of idle stages to zero, in arrays that are sharded over the stages."""

    def mask(x: jax.Array, microbatch: jax.Array) -> jax.Array:
        return jnp.where(microbatch[0] == IDLE, 0, x)

    return jax.tree.map(lambda x: _per_device(mask, _spec(x), x, microbatch_S), tree)


@dataclass(frozen=True, eq=False)
class Pipeline:
    """Runs a model on a schedule.

    Attributes:
        model: the parts of the model.
        schedule: the passes of every stage in every tick.
        loss_spec: the sharding of the `[B, T, D]` input of the head: rows or positions are sharded over `stage`.
        layers: the layers' indices by chunk, `[V, L, S]`; -1 is padding.
        unroll_loops: see `Partitioner`.
    """

    model: PipelineModel
    schedule: PipelineSchedule
    loss_spec: PartitionSpec
    layers: np.ndarray
    unroll_loops: bool = False

    def gradients(self, inputs: StepInputs) -> tuple[PyTree, PyTree, Sums, Sums]:
        """Computes the gradients of the summed loss of all microbatches.

        Returns:
            Float32 gradients of `weights` and of `shared`, the sums of the loss, and the layers' statistics
            `[V, L, S, ...]`.
        """
        passes = [(self.schedule.forward, self._forward), (self.schedule.backward, self._backward)]
        if self.schedule.weight_grad is not None:
            passes.append((self.schedule.weight_grad, self._weight_grad))
        carry = self._run(inputs, passes, self._empty_carry(inputs, train=True))
        return carry.weight_grads, carry.shared_grads, carry.sums, carry.stats

    def evaluate(self, inputs: StepInputs) -> Sums:
        """Computes the sums of the loss of all microbatches."""
        return self._run(inputs, [(self.schedule.forward, self._evaluate)], self._empty_carry(inputs, train=False)).sums

    def _run(self, inputs: StepInputs, passes: Sequence[tuple[PassTable, PassFunction]], carry: Carry) -> Carry:
        """Runs all ticks, with one scan for each series of ticks that have the same passes.

        For example 1F1B has ticks with forward passes only, then with both passes, then with backward passes only.
        """
        runs_pass = np.stack([table.any_active for table, _ in passes], axis=1)  # [ticks, passes]
        for is_active, group in itertools.groupby(range(len(runs_pass)), key=lambda tick: tuple(runs_pass[tick])):
            ticks, active = list(group), list(itertools.compress(passes, is_active))
            if not active:  # evaluation does nothing in the ticks of the last backward passes
                continue
            run_tick = partial(self._run_tick, inputs, [function for _, function in active])
            ticks_of_passes = [_ticks(table, ticks) for table, _ in active]
            carry, _ = jax.lax.scan(run_tick, carry, ticks_of_passes, unroll=self.unroll_loops)
        return carry

    def _run_tick(
        self, inputs: StepInputs, functions: Sequence[PassFunction], carry: Carry, ticks: Sequence[Tick]
    ) -> tuple[Carry, None]:
        for function, tick in zip(functions, ticks, strict=True):
            carry = function(inputs, carry, tick)
        return carry, None

    # The passes of a tick

    def _forward(self, inputs: StepInputs, carry: Carry, tick: Tick) -> Carry:
        weights = select_chunk(inputs.weights, tick.chunk)
        (y, _), (x, _) = self._apply_chunk(weights, inputs.shared, carry.activations, inputs.batch, tick)
        saved_inputs = write_slot(carry.saved_inputs, x, tick.slot)
        return carry._replace(activations=send_to_stage(y, 1), saved_inputs=saved_inputs)

    def _evaluate(self, inputs: StepInputs, carry: Carry, tick: Tick) -> Carry:
        weights = select_chunk(inputs.weights, tick.chunk)
        (y, _), _ = self._apply_chunk(weights, inputs.shared, carry.activations, inputs.batch, tick)
        _, sums = self._loss(inputs.shared, y, inputs.batch, tick)
        return carry._replace(activations=send_to_stage(y, 1), sums=_add(carry.sums, sums))

    def _apply_chunk(
        self, weights: PyTree, shared: PyTree, received: jax.Array, batch: Batch, tick: Tick
    ) -> tuple[tuple[jax.Array, jax.Array | None], tuple[jax.Array, Sums]]:
        """Applies one chunk on every stage; returns `((output, aux_loss), (input, stats))`, as `jax.vjp` expects it."""
        batch = select_microbatch(batch, tick.microbatch)
        x = receive(received, self.model.embed(shared, batch), tick, stage=0, chunk=0)
        y, stats = self.model.apply_layers(weights, x, batch, self._select_layers(tick))
        stats = mask_idle(stats, tick.microbatch)
        return (y, self.model.aux_loss(stats)), (x, stats)

    def _backward(self, inputs: StepInputs, carry: Carry, tick: Tick) -> Carry:
        """Computes the gradients of one chunk on every stage; those of its weights only if they have no own pass."""
        weights, received = select_chunk(inputs.weights, tick.chunk), read_slot(carry.saved_inputs, tick.slot)
        chunk = partial(self._apply_chunk, batch=inputs.batch, tick=tick)
        if self.schedule.weight_grad is None:
            (y, aux_loss), chunk_vjp, (_, stats) = jax.vjp(chunk, weights, inputs.shared, received, has_aux=True)
        else:
            chunk = partial(chunk, weights)
            (y, aux_loss), chunk_vjp, (_, stats) = jax.vjp(chunk, inputs.shared, received, has_aux=True)
        loss = partial(self._loss, batch=inputs.batch, tick=tick)
        total, loss_vjp, sums = jax.vjp(loss, inputs.shared, y, has_aux=True)
        head_grads, dy = loss_vjp(unit_cotangent(total))
        last_stage, last_chunk = self.schedule.stages - 1, self.schedule.chunks - 1
        dy = receive(carry.grads, dy, tick, stage=last_stage, chunk=last_chunk)
        *weight_grads, embedding_grads, dx = chunk_vjp((dy, jax.tree.map(unit_cotangent, aux_loss)))  # None stays None
        carry = carry._replace(
            grads=send_to_stage(dx, -1),
            shared_grads=_add(_add(carry.shared_grads, head_grads), embedding_grads),
            sums=_add(carry.sums, sums),
            stats=add_to_chunk(carry.stats, stats, tick.chunk),
        )
        if self.schedule.weight_grad is None:
            return carry._replace(weight_grads=add_to_chunk(carry.weight_grads, weight_grads[0], tick.chunk))
        assert carry.saved_grads is not None
        return carry._replace(saved_grads=write_slot(carry.saved_grads, dy, tick.slot))

    def _weight_grad(self, inputs: StepInputs, carry: Carry, tick: Tick) -> Carry:
        """Computes the weight gradients of one chunk on every stage, from the saved gradient of its output."""
        assert carry.saved_grads is not None
        received = read_slot(carry.saved_inputs, tick.slot)
        dy = mask_idle(read_slot(carry.saved_grads, tick.slot), tick.microbatch)
        chunk = partial(self._apply_chunk, shared=inputs.shared, received=received, batch=inputs.batch, tick=tick)
        (_, aux_loss), vjp, _ = jax.vjp(chunk, select_chunk(inputs.weights, tick.chunk), has_aux=True)
        (grads,) = vjp((dy, jax.tree.map(unit_cotangent, aux_loss)))
        return carry._replace(weight_grads=add_to_chunk(carry.weight_grads, grads, tick.chunk))

    def _loss(self, shared: PyTree, y: jax.Array, batch: Batch, tick: Tick) -> tuple[jax.Array, Sums]:
        """Returns the loss and sums of the microbatch that the last stage finishes in this tick; else zeros."""
        microbatch, chunk = (jax.reshard(a, PartitionSpec())[-1] for a in (tick.microbatch, tick.chunk))
        is_done = (microbatch != IDLE) & (chunk == self.schedule.chunks - 1)
        index = jnp.maximum(microbatch, 0)
        batch = {name: jax.lax.dynamic_index_in_dim(field, index, keepdims=False) for name, field in batch.items()}
        total, sums = self.model.output_loss(shared, scatter_last_output(y, is_done, self.loss_spec), batch)
        return _zero_unless(is_done, total), {name: _zero_unless(is_done, value) for name, value in sums.items()}

    def _select_layers(self, tick: Tick) -> jax.Array:
        layers = jax.reshard(jnp.asarray(self.layers, jnp.int32), PartitionSpec(None, None, "stage"))
        return select_chunk(layers, tick.chunk)

    def _empty_carry(self, inputs: StepInputs, *, train: bool) -> Carry:
        """Returns the state before the first tick: zeros."""
        tick = Tick(*(array[0] for array in _ticks(self.schedule.forward, [0])))  # the shapes of any tick

        def shapes(inputs: StepInputs) -> tuple[jax.Array, Sums, Sums]:
            x = self.model.embed(inputs.shared, select_microbatch(inputs.batch, tick.microbatch))
            weights = select_chunk(inputs.weights, tick.chunk)
            (y, _), (_, stats) = self._apply_chunk(weights, inputs.shared, x, inputs.batch, tick)
            _, sums = self._loss(inputs.shared, y, inputs.batch, tick)
            return x, sums, stats

        x, sums, stats = jax.eval_shape(shapes, inputs)
        slots = partial(_zeros_like, x, self.schedule.num_slots)
        return Carry(
            activations=_zeros_like(x),
            grads=_zeros_like(x),
            saved_inputs=slots(),
            saved_grads=slots() if train and self.schedule.weight_grad is not None else None,
            weight_grads=jax.tree.map(_zero_gradient, inputs.weights) if train else None,
            shared_grads=jax.tree.map(_zero_gradient, inputs.shared) if train else None,
            sums={name: _zeros_like(value) for name, value in sums.items()},
            stats={name: _zeros_like(value, self.schedule.chunks) for name, value in stats.items()},
        )


def _ticks(table: PassTable, ticks: list[int]) -> Tick:
    """Returns these ticks of a table as `[ticks, S]` arrays, sharded over the stages."""
    arrays = (jnp.asarray(array[ticks]) for array in (table.microbatch, table.chunk, table.slot))
    return Tick(*(jax.reshard(array, PartitionSpec(None, "stage")) for array in arrays))


def _zeros_like(like: jax.Array, *stacked: int) -> jax.Array:
    """Returns zeros of this type, with leading unsharded dimensions of these sizes."""
    partitions = (*(None for _ in stacked), *_spec(like).partitions)
    return unreduced_zeros((*stacked, *like.shape), like.dtype, _spec(like).update(partitions=partitions))


def _zero_gradient(weight: jax.Array) -> jax.Array:
    """Returns a float32 zero gradient, unreduced over the axes that the weight is reduced over."""
    spec = PartitionSpec(*_spec(weight).partitions, unreduced=_spec(weight).reduced)
    return unreduced_zeros(weight.shape, jnp.dtype("float32"), spec)


def _zero_unless(condition: jax.Array, total: jax.Array) -> jax.Array:
    """Returns `total`, an unreduced scalar, or zero."""
    # JAX can multiply partial sums by a factor, but not select between them.
    factor = jax.reshard(condition.astype(total.dtype), PartitionSpec(reduced=_spec(total).unreduced))
    return total * factor


def _add[T](total: T, value: T) -> T:
    return jax.tree.map(lambda t, v: t + v.astype(t.dtype), total, value)
