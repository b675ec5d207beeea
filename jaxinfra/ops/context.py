"""Attention over sequences that are spread over devices: round a ring, or on keys and values that are gathered.

Ring (Liu et al. 2023, Ring Attention): keys and values go from shard to shard, and every shard adds the part of its
softmax that it finds in those that it has (see `ops.tile`). In the backward pass they go round again, with their own
gradients in float32. What nobody of a step can see is neither computed nor, where it is a whole step, fetched: with a
sliding window a shard asks the few that it reaches.

Gather: every shard holds the keys and values of the whole sequence, as long as it works on one layer. The backward
pass gathers them again and scatters their gradients.

Nothing grows with the square of a length.

Shape suffixes: B batch, T positions of a shard, H query heads, G key/value heads, K width of a query and key head,
V width of a value head.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxinfra.errors import ConfigError
from jaxinfra.ops.attention import Kernel, See, Shape, choose
from jaxinfra.ops.route import Form, Heads, Leg, cheaper, legs
from jaxinfra.ops.tile import PLAIN, SPLASH, Partial, Segments, Tiles, empty, merge, reaches
from jaxinfra.parallel.context import SequenceSharding


@dataclass(frozen=True, kw_only=True)
class How:
    """One attention over shards, as far as it is known when it is traced."""

    sharding: SequenceSharding
    see: See
    form: Form
    tiles: Tiles

    def start(self, shard: jax.Array, piece: int, block: int) -> jax.Array:
        """The position of the first query or key of a piece."""
        return self.sharding.block_index(shard, piece) * block


# Inside a `shard_map`; `[B, H, T, K]` here, heads before positions, as kernels want them.


def _pieces(how: How, x: jax.Array | None, dim: int = 2) -> list[Any]:
    return (
        [None] * how.sharding.blocks_per_shard if x is None else jnp.split(x, how.sharding.blocks_per_shard, axis=dim)
    )


def _both(one: Any, other: Any) -> Segments:
    return None if one is None else (one, other)


def _when(here: jax.Array, always: bool, fun: Any, state: Any) -> Any:
    return fun(state) if always else jax.lax.cond(here, fun, lambda state: state, state)


def _ring(how: How, step: Any, state: Any, kv: Any, block: int) -> Any:
    """Takes `step(state, kv, source, leg)` through all steps; `source` is the shard that `kv` are of."""
    source = jax.lax.axis_index(how.sharding.axes)
    for leg in legs(how.sharding, how.see, block):

        def body(carry: Any, _: None, leg: Leg = leg) -> tuple[Any, None]:
            state, kv, source = carry
            onward = how.sharding.rotate(kv, leg.depart) if leg.depart else kv  # on the way while this step computes
            state = step(state, kv, source, leg)
            return (state, onward, (source - leg.depart) % how.sharding.num_shards), None

        carry = (state, kv, source)
        carry = body(carry, None)[0] if leg.steps == 1 else jax.lax.scan(body, carry, length=leg.steps)[0]
        state, kv, source = carry
    return state


def _ring_forward(how: How, q, k, v, segments) -> Partial:
    qs, ids = _pieces(how, q), _pieces(how, segments, 1)
    block, me = qs[0].shape[2], jax.lax.axis_index(how.sharding.axes)

    def step(found: list[Partial], kv: Any, source: jax.Array, leg: Leg) -> list[Partial]:
        ks, vs, kv_ids = _pieces(how, kv[0]), _pieces(how, kv[1]), _pieces(how, kv[2], 1)
        found = list(found)
        for p, r, always in leg.pairs:
            offset = how.start(me, p, block) - how.start(source, r, block)

            def add(one: Partial, p=p, r=r, offset=offset) -> Partial:
                return merge(one, how.tiles.forward(qs[p], ks[r], vs[r], _both(ids[p], kv_ids[r]), offset, how.see))

            found[p] = _when(reaches(how.see, offset, block, block), always, add, found[p])
        return found

    found = _ring(how, step, [empty(one, v.shape[-1]) for one in qs], (k, v, segments), block)
    return Partial(*_joined(found))


def _ring_backward(how: How, q, k, v, segments, lse, di, do) -> tuple[jax.Array, jax.Array, jax.Array]:
    of_queries = (_pieces(how, a) for a in (q, lse, di, do))
    queries = list(zip(*of_queries, _pieces(how, segments, 1), strict=True))
    block, me = queries[0][0].shape[2], jax.lax.axis_index(how.sharding.axes)

    def zeros(x: jax.Array) -> jax.Array:
        return jnp.zeros_like(x, jnp.float32)

    def step(state: Any, kv: Any, source: jax.Array, leg: Leg) -> Any:
        dq, travelled = state
        kvs = list(zip(_pieces(how, kv[0]), _pieces(how, kv[1]), _pieces(how, kv[2], 1), strict=True))
        dq, dkv = list(dq), [(zeros(k), zeros(v)) for k, v, _ in kvs]
        # Gradients go after keys and values: they arrive while this step computes what it adds to them.
        travelled = how.sharding.rotate(travelled, leg.arrive)
        for p, r, always in leg.pairs:
            offset = how.start(me, p, block) - how.start(source, r, block)

            def add(sums: Any, p=p, r=r, offset=offset) -> Any:
                (one, *rest, ids), (k, v, kv_ids) = queries[p], kvs[r]
                found = how.tiles.backward(one, k, v, _both(ids, kv_ids), offset, how.see, *rest)
                return jax.tree.map(lambda total, d: total + d.astype(jnp.float32), sums, found)

            sums = _when(reaches(how.see, offset, block, block), always, add, (dq[p], *dkv[r]))
            dq[p], dkv[r] = sums[0], sums[1:]
        return dq, jax.tree.map(jnp.add, travelled, _joined(dkv))

    dq, dkv = _ring(how, step, ([zeros(one[0]) for one in queries], (zeros(k), zeros(v))), (k, v, segments), block)
    last = sum(leg.depart * leg.steps for leg in legs(how.sharding, how.see, block))
    return jnp.concatenate(dq, axis=2), *how.sharding.rotate(dkv, -last)


def _joined(pieces: Iterable[tuple[jax.Array, ...]]) -> tuple[jax.Array, ...]:
    return tuple(jnp.concatenate(parts, axis=2) for parts in zip(*pieces, strict=True))


def _gathered(how: How, x: jax.Array | None, dim: int) -> Any:
    if x is None:
        return None
    return how.sharding.to_natural_order(jax.lax.all_gather(x, how.sharding.axes, axis=dim, tiled=True), dim)


def _on_gathered(how: How, tile: Any, k, v, segments, *queries) -> list[Any]:
    """Applies a forward or backward tile to each piece of the queries, and what goes with it, on all keys."""
    whole = [_gathered(how, a, 2) for a in (k, v)]
    ids, me, found = _gathered(how, segments, 1), jax.lax.axis_index(how.sharding.axes), []
    of_queries = (_pieces(how, a) for a in queries)
    for p, (one, *rest, own) in enumerate(zip(*of_queries, _pieces(how, segments, 1), strict=True)):
        first = how.start(me, p, one.shape[2])
        found.append(tile(one, *whole, _both(own, ids), first, how.see, *rest))
    return found


def _gather_forward(how: How, q, k, v, segments) -> Partial:
    return Partial(*_joined(_on_gathered(how, how.tiles.forward, k, v, segments, q)))


def _gather_backward(how: How, q, k, v, segments, lse, di, do) -> tuple[jax.Array, jax.Array, jax.Array]:
    dq, *dkv = zip(*_on_gathered(how, how.tiles.backward, k, v, segments, q, lse, di, do), strict=True)

    def scattered(parts: tuple[jax.Array, ...]) -> jax.Array:
        total = how.sharding.to_shard_order(sum(parts[1:], parts[0]).astype(k.dtype), 2)
        return jax.lax.psum_scatter(total, how.sharding.axes, scatter_dimension=2, tiled=True)

    dk, dv = map(scattered, dkv)
    return jnp.concatenate(dq, axis=2), dk, dv


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(how: How, q_BHTK, k_BGTK, v_BGTV, segments_BT) -> jax.Array:
    return _forward(how, q_BHTK, k_BGTK, v_BGTV, segments_BT)[0]


def _forward(how: How, q, k, v, segments) -> tuple[jax.Array, Any]:
    found = (_ring_forward if how.form == "ring" else _gather_forward)(how, q, k, v, segments)
    out = found.out.astype(q.dtype)
    return out, (q, k, v, segments, out, found.lse)


def _backward(how: How, saved: Any, do: jax.Array) -> tuple[Any, ...]:
    q, k, v, segments, out, lse = saved
    di = jnp.sum(out.astype(jnp.float32) * do.astype(jnp.float32), axis=-1)
    backward = _ring_backward if how.form == "ring" else _gather_backward
    found = backward(how, q, k, v, segments, lse, di, do)
    return *(d.astype(a.dtype) for d, a in zip(found, (q, k, v), strict=True)), None


_attention.defvjp(_forward, _backward)


def tiles_of(see: See, shape: Shape, platform: str, forced: Kernel | None = None) -> Tiles:
    """The implementation of parts of this shape; a ConfigError where the kernel that is asked for cannot do it."""
    name = choose(see, shape, platform, forced)
    if forced == "cudnn":
        raise ConfigError(
            "model.attention=cudnn: refused: it has no form for sequences that are spread over devices; "
            "use model.attention=none to let it be chosen"
        )
    return SPLASH if name == "splash" else PLAIN


def attend_across(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGV: jax.Array,
    see: See,
    *,
    sharding: SequenceSharding,
    platform: str,
    segments_BT: jax.Array | None = None,
    forced: Kernel | None = None,
    form: Form | Literal["auto"] = "auto",
    tiles: Tiles | None = None,
) -> jax.Array:
    """Self-attention over sequences that are sharded in `sharding`: `[B, T, H, V]`, sharded like `q_BTHK`.

    Args:
        q_BTHK: queries; positions over the axes of `sharding`, rows and heads over any others.
        k_BTGK: keys, sharded alike; `H` is a multiple of `G`.
        v_BTGV: values.
        see: what may be seen.
        sharding: which positions each shard has.
        platform: "cpu", "gpu" or "tpu".
        segments_BT: document ids.
        forced: the kernel that the config asks for; a ConfigError where it refuses.
        form: the way of keys and values; "auto" takes the cheaper (see `ops.route`).
        tiles: for tests: the implementation of the parts.
    """
    q_sharding = jax.typeof(q_BTHK).sharding
    rows, _, heads, head_dim = q_sharding.shard_shape(q_BTHK.shape)
    length, value_dim = q_BTHK.shape[1], v_BTGV.shape[-1]
    groups = jax.typeof(k_BTGK).sharding.shard_shape(k_BTGK.shape)[2]
    if form == "auto":
        widths = {"head_dim": head_dim, "value_dim": value_dim, "itemsize": q_BTHK.dtype.itemsize}
        form = cheaper(sharding, see, Heads(rows=rows, length=length, heads=heads, groups=groups, **widths))
    if tiles is None:
        block = length // (sharding.num_shards * sharding.blocks_per_shard)
        shape = Shape(
            queries=block,
            keys=length if form == "gather" else block,
            head_dim=head_dim,
            value_dim=value_dim,
            indexed=False,
            dtype=q_BTHK.dtype,
        )
        tiles = tiles_of(see, shape, platform, forced)
    how = How(sharding=sharding, see=see, form=form, tiles=tiles)
    scale = head_dim**-0.5 if see.scale is None else see.scale

    def local(q, k, v, segments):
        q, k, v = (a.transpose(0, 2, 1, 3) for a in (q * scale, k, v))
        return _attention(how, q.astype(k.dtype), k, v, segments).transpose(0, 2, 1, 3)

    arrays = (q_BTHK, k_BTGK, v_BTGV, segments_BT)
    specs = jax.tree.map(lambda a: jax.typeof(a).sharding.spec, arrays)
    # Of kernels JAX does not know over which mesh axes their values vary (see `ops.attention.PLAIN`).
    sharded = jax.shard_map(local, in_specs=specs, out_specs=q_sharding.spec, check_vma=tiles is PLAIN)
    return sharded(*arrays)
