"""Self-attention over sequences that are sharded over devices (context parallelism), as a ring or by all-gather.

Ring (Liu et al. 2023, Ring Attention): keys and values are sent from shard to shard, and every shard accumulates its
softmax (see `ops.block_attention`). The backward pass sends them again, together with their float32 gradients. Steps in
which the mask hides all keys are skipped: with a sliding window a shard receives the keys of near shards only.

All-gather: every shard holds the keys and values of the whole sequence for one layer at a time. The backward pass
gathers them again and scatters their gradients.

No array grows with the square of a length.

Shape suffixes: B batch, T positions of a shard, H query heads, G key/value heads, K head dim of queries and keys,
V head dim of values. Inside the `shard_map` heads come before positions (`[B, H, T, K]`), as kernels want them.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxinfra.errors import ConfigError
from jaxinfra.ops.attention import AttentionSpec, Kernel, KernelInputs, choose_kernel
from jaxinfra.ops.block_attention import (
    JAX_BLOCKS,
    SPLASH_BLOCKS,
    BlockAttention,
    Gradients,
    OutputGradient,
    QKVBlock,
    SoftmaxPartial,
    block_is_visible,
    empty_partial,
    merge_partials,
)
from jaxinfra.ops.context_cost import AttentionSizes, ContextMethod, RingPhase, choose_method, ring_phases
from jaxinfra.parallel.context import SequenceSharding


@dataclass(frozen=True, kw_only=True)
class ContextSpec:
    """The static parameters of context-parallel attention."""

    sharding: SequenceSharding
    spec: AttentionSpec
    method: ContextMethod
    blocks: BlockAttention


class KVShard(NamedTuple):
    """Keys `[B, G, T, K]`, values `[B, G, T, V]` and document ids `[B, T]` of one shard."""

    k: jax.Array
    v: jax.Array
    ids: jax.Array | None


type BackwardState = tuple[list[jax.Array], tuple[jax.Array, jax.Array]]
"""Gradients of the shard's own queries, by block, and of the keys and values that the shard holds in this step."""


def _position_dim(x: jax.Array) -> int:
    return 1 if x.ndim == 2 else 2  # ids have no heads


def _split[T](context: ContextSpec, shard: T) -> list[T]:
    """Splits the arrays of a shard into its blocks of consecutive positions."""
    leaves, tree = jax.tree.flatten(shard)
    parts = [jnp.split(x, context.sharding.blocks_per_shard, axis=_position_dim(x)) for x in leaves]
    return [tree.unflatten(block) for block in zip(*parts, strict=True)]


def _join[T](blocks: Sequence[T]) -> T:
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=2), *blocks)


def _qkv_block(q: jax.Array, q_ids: jax.Array | None, kv: KVShard, distance: jax.Array) -> QKVBlock:
    """Pairs queries with keys; `distance` is the queries' block index minus the keys' block index."""
    segments = None if q_ids is None or kv.ids is None else (q_ids, kv.ids)
    return QKVBlock(q, kv.k, kv.v, segments, distance * q.shape[2])


def _if_visible[S](context: ContextSpec, block: QKVBlock, always: bool, add: Callable[[S], S], total: S) -> S:
    visible = block_is_visible(context.spec, block.offset, block.q.shape[2], block.k.shape[2])
    return add(total) if always else jax.lax.cond(visible, add, lambda total: total, total)


def _ring[S](
    context: ContextSpec,
    step: Callable[[S, KVShard, jax.Array, RingPhase], S],
    state: S,
    kv: KVShard,
) -> S:
    """Runs `step(state, kv, source, phase)` for all steps of the ring; `source` is the shard that owns `kv`."""
    sharding, source = context.sharding, jax.lax.axis_index(context.sharding.axes)
    for phase in ring_phases(sharding, context.spec, kv.k.shape[2] // sharding.blocks_per_shard):

        def body(
            carry: tuple[S, KVShard, jax.Array], _: None, phase: RingPhase = phase
        ) -> tuple[tuple[S, KVShard, jax.Array], None]:
            state, kv, source = carry
            # Sent before the step, so that the transfer overlaps with its computation.
            next_kv = sharding.rotate(kv, phase.shift_out) if phase.shift_out else kv
            state = step(state, kv, source, phase)
            return (state, next_kv, (source - phase.shift_out) % sharding.num_shards), None

        carry = (state, kv, source)
        carry = body(carry, None)[0] if phase.steps == 1 else jax.lax.scan(body, carry, length=phase.steps)[0]
        state, kv, source = carry
    return state


def _ring_forward(context: ContextSpec, q: jax.Array, kv: KVShard) -> SoftmaxPartial:
    sharding, me = context.sharding, jax.lax.axis_index(context.sharding.axes)
    queries = _split(context, (q, kv.ids))

    def step(partials: list[SoftmaxPartial], kv: KVShard, source: jax.Array, phase: RingPhase) -> list[SoftmaxPartial]:
        partials, keys = list(partials), _split(context, kv)
        for i, j, always in phase.pairs:
            block = _qkv_block(*queries[i], keys[j], sharding.block_index(me, i) - sharding.block_index(source, j))

            def add(total: SoftmaxPartial, block: QKVBlock = block) -> SoftmaxPartial:
                return merge_partials(total, context.blocks.forward(block, context.spec))

            partials[i] = _if_visible(context, block, always, add, partials[i])
        return partials

    return _join(_ring(context, step, [empty_partial(block, kv.v.shape[-1]) for block, _ in queries], kv))


def _ring_backward(context: ContextSpec, q: jax.Array, kv: KVShard, gradient: OutputGradient) -> Gradients:
    sharding, me = context.sharding, jax.lax.axis_index(context.sharding.axes)
    queries = _split(context, (q, kv.ids, gradient))

    def zeros(x: jax.Array) -> jax.Array:
        return jnp.zeros_like(x, jnp.float32)

    def step(state: BackwardState, kv: KVShard, source: jax.Array, phase: RingPhase) -> BackwardState:
        keys = _split(context, kv)
        dq, dkv = list(state[0]), [(zeros(block.k), zeros(block.v)) for block in keys]
        # Gradients travel around the ring with their keys and values. They arrive while this step computes its part.
        dkv_of_others = sharding.rotate(state[1], phase.shift_in)
        for i, j, always in phase.pairs:
            q_block, ids, gradient_block = queries[i]
            block = _qkv_block(q_block, ids, keys[j], sharding.block_index(me, i) - sharding.block_index(source, j))

            def add(total: Gradients, block: QKVBlock = block, gradient: OutputGradient = gradient_block) -> Gradients:
                new = context.blocks.backward(block, context.spec, gradient)
                return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, new)

            dq[i], *dkv_block = _if_visible(context, block, always, add, (dq[i], *dkv[j]))
            dkv[j] = (dkv_block[0], dkv_block[1])
        return dq, jax.tree.map(jnp.add, dkv_of_others, _join(dkv))

    dq, dkv = _ring(context, step, ([zeros(block) for block, *_ in queries], (zeros(kv.k), zeros(kv.v))), kv)
    phases = ring_phases(sharding, context.spec, queries[0][0].shape[2])
    # After the last step, the gradients return to the shard of their keys and values.
    shift = sum(phase.shift_out * phase.steps for phase in phases)
    return jnp.concatenate(dq, axis=2), *sharding.rotate(dkv, -shift)


def _gather(context: ContextSpec, q: jax.Array, kv: KVShard) -> Iterator[QKVBlock]:
    """Yields each block of the shard's queries with the keys of the whole sequence."""
    sharding = context.sharding

    def gather(x: jax.Array) -> jax.Array:
        dim = _position_dim(x)
        return sharding.to_natural_order(jax.lax.all_gather(x, sharding.axes, axis=dim, tiled=True), dim)

    gathered, me = jax.tree.map(gather, kv), jax.lax.axis_index(sharding.axes)
    for i, (q_block, ids) in enumerate(_split(context, (q, kv.ids))):
        yield _qkv_block(q_block, ids, gathered, sharding.block_index(me, i))


def _gather_forward(context: ContextSpec, q: jax.Array, kv: KVShard) -> SoftmaxPartial:
    return _join([context.blocks.forward(block, context.spec) for block in _gather(context, q, kv)])


def _gather_backward(context: ContextSpec, q: jax.Array, kv: KVShard, gradient: OutputGradient) -> Gradients:
    sharding = context.sharding
    blocks = zip(_gather(context, q, kv), _split(context, gradient), strict=True)
    dq, dk, dv = zip(*(context.blocks.backward(block, context.spec, part) for block, part in blocks), strict=True)

    def scatter(parts: tuple[jax.Array, ...]) -> jax.Array:
        total = sharding.to_shard_order(functools.reduce(jnp.add, parts).astype(kv.k.dtype), 2)
        return jax.lax.psum_scatter(total, sharding.axes, scatter_dimension=2, tiled=True)

    return jnp.concatenate(dq, axis=2), scatter(dk), scatter(dv)


type Saved = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    context: ContextSpec, q_BHTK: jax.Array, k_BGTK: jax.Array, v_BGTV: jax.Array, ids_BT: jax.Array | None
) -> jax.Array:
    return _forward(context, q_BHTK, k_BGTK, v_BGTV, ids_BT)[0]


def _forward(
    context: ContextSpec, q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array | None
) -> tuple[jax.Array, Saved]:
    forward = _ring_forward if context.method == "ring" else _gather_forward
    result = forward(context, q, KVShard(k, v, ids))
    out = result.out.astype(q.dtype)
    return out, (q, k, v, ids, out, result.lse)


def _backward(context: ContextSpec, saved: Saved, do: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, ids, out, lse = saved
    di = jnp.sum(out.astype(jnp.float32) * do.astype(jnp.float32), axis=-1)
    backward = _ring_backward if context.method == "ring" else _gather_backward
    dq, dk, dv = backward(context, q, KVShard(k, v, ids), OutputGradient(lse, di, do))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


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
    blocks: BlockAttention | None = None,
) -> jax.Array:
    """Computes self-attention over sharded sequences: `[B, T, H, V]`, sharded like `q_BTHK`.

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
        blocks: overrides the implementation, for tests.
    """
    q_sharding = jax.typeof(q_BTHK).sharding
    batch, _, num_heads, head_dim = q_sharding.shard_shape(q_BTHK.shape)
    seq_len, value_dim = q_BTHK.shape[1], v_BTGV.shape[-1]
    if method == "auto":
        sizes = AttentionSizes(
            batch=batch,
            seq_len=seq_len,
            num_heads=num_heads,
            num_kv_heads=jax.typeof(k_BTGK).sharding.shard_shape(k_BTGK.shape)[2],
            head_dim=head_dim,
            value_dim=value_dim,
            itemsize=q_BTHK.dtype.itemsize,
        )
        method = choose_method(sharding, spec, sizes)
    if blocks is None:
        if kernel == "cudnn":
            raise ConfigError(
                "model.attention_kernel=cudnn: it does not support sequences that are sharded over devices "
                "(mesh.context above 1); use model.attention_kernel=none for the fastest that can run"
            )
        block_len = seq_len // (sharding.num_shards * sharding.blocks_per_shard)
        inputs = KernelInputs(
            q_len=block_len,
            kv_len=seq_len if method == "gather" else block_len,
            head_dim=head_dim,
            value_dim=value_dim,
            explicit_positions=False,
            dtype=q_BTHK.dtype,
        )
        blocks = SPLASH_BLOCKS if choose_kernel(spec, inputs, platform, kernel) == "splash" else JAX_BLOCKS
    context = ContextSpec(sharding=sharding, spec=spec, method=method, blocks=blocks)
    scale = head_dim**-0.5 if spec.scale is None else spec.scale

    def local(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array | None) -> jax.Array:
        q, k, v = (a.transpose(0, 2, 1, 3) for a in (q * scale, k, v))
        return _attention(context, q.astype(k.dtype), k, v, ids).transpose(0, 2, 1, 3)

    arrays = (q_BTHK, k_BTGK, v_BTGV, ids_BT)
    specs = jax.tree.map(lambda a: jax.typeof(a).sharding.spec, arrays)
    # JAX cannot check kernels that are not written in JAX (see `dot_product_attention`).
    sharded = jax.shard_map(local, in_specs=specs, out_specs=q_sharding.spec, check_vma=blocks is JAX_BLOCKS)
    return sharded(*arrays)
