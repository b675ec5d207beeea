"""Self-attention over sequences that are sharded over devices (context parallelism), and self-attention with sinks.

Both need kernels that return the log-sum-exp of the scores. There are two methods for sharded sequences.

Ring (Liu et al. 2023, Ring Attention): keys and values are sent from shard to shard, and every shard accumulates its
softmax (see `ops.block_attention`). The backward pass sends them again, together with their float32 gradients. Steps in
which the mask hides all keys are skipped: with a sliding window a shard receives the keys of near shards only.

All-gather: every shard holds the keys and values of the whole sequence for one layer at a time. The backward pass
gathers them again and scatters their gradients.

A sink is the score of an additional key of its head, whose value is zero (GPT-OSS; Xiao et al. 2023, "Efficient
streaming language models with attention sinks"). It multiplies the output by `sigmoid(lse - sink)`. The backward pass
is that of the other keys with `logaddexp(lse, sink)`, so any kernel that returns the log-sum-exp can have sinks.

No array grows with the square of a length.

Shape suffixes: B batch, T positions of a shard, H query heads, G key/value heads, K head dim of queries and keys,
V head dim of values. Inside the `shard_map` arrays have no suffixes, and heads come before positions, as kernels want
them: queries are `[B, H, T, K]`, keys `[B, G, T, K]`, values `[B, G, T, V]`.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxinfra.errors import ConfigError
from jaxinfra.ops.attention import ATTENTION_RESIDUALS, AttentionSpec, Kernel, KernelInputs, choose_kernel
from jaxinfra.ops.block_attention import (
    JAX_BLOCKS,
    KV,
    BlockAttention,
    Gradients,
    OutputGradient,
    QKVBlock,
    SoftmaxPartial,
    empty_partial,
    merge_partials,
    position_dim,
)
from jaxinfra.ops.context_cost import AttentionSizes, ContextMethod, RingStep, choose_method, ring_steps
from jaxinfra.parallel.context import SequenceSharding
from jaxinfra.parallel.sharding import local_shape, local_weight


@dataclass(frozen=True, kw_only=True)
class ContextSpec:
    """The static parameters of context-parallel attention.

    A shard has one block of `block_len` consecutive positions, or two; `implementation` computes one block of keys.
    """

    sharding: SequenceSharding
    spec: AttentionSpec
    method: ContextMethod
    implementation: BlockAttention
    block_len: int

    def split[T](self, shard: T) -> list[T]:
        """Splits the arrays of a shard into its blocks of consecutive positions."""

        def block(x: jax.Array, index: int) -> jax.Array:
            start = index * self.block_len
            return jax.lax.slice_in_dim(x, start, start + self.block_len, axis=position_dim(x))

        blocks = range(self.sharding.blocks_per_shard)
        return [jax.tree.map(functools.partial(block, index=index), shard) for index in blocks]


def _join[T](blocks: Sequence[T]) -> T:
    """Reverses `ContextSpec.split`, for arrays with heads."""
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=2), *blocks)


# Ring

type RingState[QSum, KVSum] = tuple[list[QSum], KVSum, KV, jax.Array]
"""The sums of `_ring`, the keys and values that a shard holds now, and the shard that they come from."""


def _ring[QSum, KVSum](
    context: ContextSpec,
    add: Callable[[int, QKVBlock, QSum, KVSum], tuple[QSum, KVSum]],
    q: jax.Array,
    kv: KV,
    q_sums: list[QSum],
    kv_sums: KVSum,
) -> tuple[list[QSum], KVSum]:
    """Sums over the keys of all shards, for each block of the shard's queries, and over all queries, for its keys.

    Args:
        context: the static parameters.
        add: `add(i, block, q_sum, kv_sum)` adds what block i of the queries and one block of keys contribute.
        q: the shard's own queries.
        kv: the shard's own keys and values.
        q_sums: start of the sum for each block of queries.
        kv_sums: start of the sums for the shard's keys: zeros. These sums move around the ring with their keys, and
            return to their shard at the end. None if only queries need sums.
    """
    sharding, own_shard = context.sharding, jax.lax.axis_index(context.sharding.axes)
    queries = context.split((q, kv.ids))

    def run_step(state: RingState[QSum, KVSum], _: None, step: RingStep) -> tuple[RingState[QSum, KVSum], None]:
        q_sums, kv_sums, kv, source = state
        # Both transfers overlap with the computation of this step, which needs neither result.
        next_kv, kv_sums = sharding.rotate(kv, step.shift_out), sharding.rotate(kv_sums, step.shift_in)
        q_sums, keys = list(q_sums), context.split(kv)
        new_sums = context.split(jax.tree.map(jnp.zeros_like, kv_sums))
        for i, j, always_visible in step.pairs:
            distance = sharding.block_index(own_shard, i) - sharding.block_index(source, j)
            block = QKVBlock(*queries[i], keys[j], distance * context.block_len)
            add_block = functools.partial(add, i, block)
            if always_visible:
                sums = add_block(q_sums[i], new_sums[j])
            else:
                visible = block.is_visible(context.spec)
                sums = jax.lax.cond(visible, add_block, lambda *sums: sums, q_sums[i], new_sums[j])
            q_sums[i], new_sums[j] = sums
        kv_sums = jax.tree.map(jnp.add, kv_sums, _join(new_sums))
        return (q_sums, kv_sums, next_kv, (source - step.shift_out) % sharding.num_shards), None

    state, steps = (q_sums, kv_sums, kv, own_shard), ring_steps(sharding, context.spec, context.block_len)
    for step, equal_steps in itertools.groupby(steps):  # a loop compiles equal steps only once
        body, length = functools.partial(run_step, step=step), len(list(equal_steps))
        if length == 1:
            state, _ = body(state, None)
        else:
            state, _ = jax.lax.scan(body, state, length=length, unroll=sharding.unroll_loops)
    q_sums, kv_sums, *_ = state
    return q_sums, sharding.rotate(kv_sums, -sum(step.shift_out for step in steps))


def _ring_forward(context: ContextSpec, q: jax.Array, kv: KV) -> SoftmaxPartial:
    def add(_: int, block: QKVBlock, total: SoftmaxPartial, kv_sum: None) -> tuple[SoftmaxPartial, None]:
        return merge_partials(total, context.implementation.forward(block, context.spec)), kv_sum

    empty = [empty_partial(block, kv.v.shape[-1]) for block in context.split(q)]
    return _join(_ring(context, add, q, kv, empty, None)[0])


type KVGradients = tuple[jax.Array, jax.Array]
"""Float32 gradients of keys and values."""


def _ring_backward(context: ContextSpec, q: jax.Array, kv: KV, gradient: OutputGradient) -> Gradients:
    gradients = context.split(gradient)

    def add(i: int, block: QKVBlock, dq: jax.Array, dkv: KVGradients) -> tuple[jax.Array, KVGradients]:
        block_dq, *block_dkv = context.implementation.backward(block, context.spec, gradients[i])
        new = (block_dq, tuple(block_dkv))
        return jax.tree.map(lambda total, part: total + part.astype(jnp.float32), (dq, dkv), new)

    zeros = functools.partial(jnp.zeros_like, dtype=jnp.float32)
    dq, (dk, dv) = _ring(context, add, q, kv, [*map(zeros, context.split(q))], (zeros(kv.k), zeros(kv.v)))
    return _join(dq), dk, dv


# All-gather


def _gather(context: ContextSpec, q: jax.Array, kv: KV) -> Iterator[QKVBlock]:
    """Yields each block of the shard's queries with the keys of the whole sequence."""
    sharding = context.sharding
    if sharding.num_shards == 1:
        yield QKVBlock(q, kv.ids, kv, jnp.zeros((), jnp.int32))
        return

    def gather(x: jax.Array) -> jax.Array:
        dim = position_dim(x)
        return sharding.to_natural_order(jax.lax.all_gather(x, sharding.axes, axis=dim, tiled=True), dim)

    gathered, own_shard = jax.tree.map(gather, kv), jax.lax.axis_index(sharding.axes)
    for i, (q_block, ids) in enumerate(context.split((q, kv.ids))):
        yield QKVBlock(q_block, ids, gathered, sharding.block_index(own_shard, i) * context.block_len)


def _gather_forward(context: ContextSpec, q: jax.Array, kv: KV) -> SoftmaxPartial:
    return _join([context.implementation.forward(block, context.spec) for block in _gather(context, q, kv)])


def _gather_backward(context: ContextSpec, q: jax.Array, kv: KV, gradient: OutputGradient) -> Gradients:
    sharding, backward = context.sharding, context.implementation.backward
    blocks = zip(_gather(context, q, kv), context.split(gradient), strict=True)
    dq, dk, dv = zip(*(backward(block, context.spec, part) for block, part in blocks), strict=True)

    def scatter(parts: tuple[jax.Array, ...]) -> jax.Array:
        if sharding.num_shards == 1:
            return functools.reduce(jnp.add, parts)
        total = sharding.to_shard_order(functools.reduce(jnp.add, parts).astype(kv.k.dtype), 2)
        return jax.lax.psum_scatter(total, sharding.axes, scatter_dimension=2, tiled=True)

    return _join(dq), scatter(dk), scatter(dv)


# Both methods, with sinks

type Saved = tuple[jax.Array, KV, jax.Array | None, jax.Array, jax.Array]
"""Queries, keys and values, sinks, the output, and the log-sum-exp of scores and sinks."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(context: ContextSpec, q_BHTK: jax.Array, kv: KV, sinks_BHT: jax.Array | None) -> jax.Array:
    return _forward(context, q_BHTK, kv, sinks_BHT)[0]


def _forward(context: ContextSpec, q: jax.Array, kv: KV, sinks: jax.Array | None) -> tuple[jax.Array, Saved]:
    forward = _ring_forward if context.method == "ring" else _gather_forward
    out, lse = forward(context, q, kv)
    if sinks is not None:  # see the module
        out, lse = out * jax.nn.sigmoid(lse - sinks)[..., None], jnp.logaddexp(lse, sinks)
    out, lse = (checkpoint_name(x, ATTENTION_RESIDUALS) for x in (out.astype(q.dtype), lse))
    return out, (q, kv, sinks, out, lse)


def _backward(context: ContextSpec, saved: Saved, do: jax.Array) -> tuple[jax.Array, KV, jax.Array | None]:
    q, kv, sinks, out, lse = saved
    di = jnp.sum(out.astype(jnp.float32) * do.astype(jnp.float32), axis=-1)
    backward = _ring_backward if context.method == "ring" else _gather_backward
    dq, dk, dv = backward(context, q, kv, OutputGradient(lse, di, do))
    dsinks = None if sinks is None else -jnp.exp(sinks - lse) * di
    return dq.astype(q.dtype), KV(dk.astype(kv.k.dtype), dv.astype(kv.v.dtype), None), dsinks


_attention.defvjp(_forward, _backward)


def context_parallel_attention(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGV: jax.Array,
    spec: AttentionSpec,
    *,
    sharding: SequenceSharding,
    platform: str,
    ids_BT: jax.Array | None = None,
    kernel: Kernel | None = None,
    method: ContextMethod | Literal["auto"] = "auto",
    implementation: BlockAttention | None = None,
    sinks_H: jax.Array | None = None,
) -> jax.Array:
    """Computes self-attention, also over sharded sequences: `[B, T, H, V]`, sharded like `q_BTHK`.

    Args:
        q_BTHK: queries; T is sharded over `sharding.axes`, B and H over any others.
        k_BTGK: keys, sharded like the queries; `H` is a multiple of `G`.
        v_BTGV: values.
        spec: mask, soft cap and scale.
        sharding: which positions each shard has.
        platform: "cpu", "gpu" or "tpu".
        ids_BT: document ids, for packed sequences.
        kernel: forces a kernel; raises ConfigError if it cannot run.
        method: "auto" takes the cheaper one (see `ops.context_cost`).
        implementation: overrides the choice by platform and kernel, for tests.
        sinks_H: the sink of each head, sharded like the heads.
    """
    sizes = _local_sizes(q_BTHK, k_BTGK, v_BTGV)
    block_len = sizes.seq_len // (sharding.num_shards * sharding.blocks_per_shard)
    if sharding.num_shards == 1:
        method = "gather"
    elif method == "auto":
        method = choose_method(sharding, spec, sizes)
    if implementation is None:
        inputs = KernelInputs(
            q_len=block_len,
            kv_len=sizes.seq_len if method == "gather" else block_len,
            head_dim=sizes.head_dim,
            value_dim=sizes.value_dim,
            explicit_positions=False,
            dtype=q_BTHK.dtype,
        )
        implementation = _choose_implementation(spec, inputs, platform, kernel)
    context = ContextSpec(
        sharding=sharding, spec=spec, method=method, implementation=implementation, block_len=block_len
    )
    return _on_shards(context, q_BTHK, k_BTGK, v_BTGV, ids_BT, sinks_H)


def _local_sizes(q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGV: jax.Array) -> AttentionSizes:
    """Returns the sizes of a device's part, but with the length of the whole sequence."""
    batch, _, num_heads, head_dim = local_shape(q_BTHK)
    return AttentionSizes(
        batch=batch,
        seq_len=q_BTHK.shape[1],
        num_heads=num_heads,
        num_kv_heads=local_shape(k_BTGK)[2],
        head_dim=head_dim,
        value_dim=v_BTGV.shape[-1],
        itemsize=q_BTHK.dtype.itemsize,
    )


def _choose_implementation(
    spec: AttentionSpec, inputs: KernelInputs, platform: str, kernel: Kernel | None
) -> BlockAttention:
    """Returns the splash kernels where `choose_kernel` takes them, else JAX's; ConfigError if `kernel` cannot run."""
    if kernel == "cudnn":
        raise ConfigError(
            "model.attention_kernel=cudnn: it does not support sinks, or sequences that are sharded over devices "
            "(mesh.context above 1); use model.attention_kernel=none for the fastest that can run"
        )
    if choose_kernel(spec, inputs, platform, kernel) != "splash":
        return JAX_BLOCKS
    from jaxinfra.ops.splash_blocks import SPLASH_BLOCKS

    return SPLASH_BLOCKS


def _on_shards(
    context: ContextSpec,
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGV: jax.Array,
    ids_BT: jax.Array | None,
    sinks_H: jax.Array | None,
) -> jax.Array:
    """Computes attention on each device from its shards of queries, keys, values, document ids and sinks."""

    def local(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array | None, sinks: jax.Array | None) -> jax.Array:
        scale = context.spec.qk_scale(q.shape[-1])
        q, k, v = (a.transpose(0, 2, 1, 3) for a in (q * scale, k, v))
        if sinks is not None:
            # A sink for each query, which varies over the same mesh axes: JAX adds up the gradients of devices.
            sinks = jnp.zeros_like(q[..., 0], jnp.float32) + local_weight(sinks, specs[-1])[:, None]
        return _attention(context, q.astype(k.dtype), KV(k, v, ids), sinks).transpose(0, 2, 1, 3)

    arrays = (q_BTHK, k_BTGK, v_BTGV, ids_BT, sinks_H)
    specs = jax.tree.map(lambda a: jax.typeof(a).sharding.spec, arrays)
    # JAX cannot check kernels that are not written in JAX (see `dot_product_attention`).
    check_vma = context.implementation is JAX_BLOCKS
    return jax.shard_map(local, in_specs=specs, out_specs=specs[0], check_vma=check_vma)(*arrays)
