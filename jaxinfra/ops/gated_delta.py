"""The gated delta rule (Yang et al. 2024, "Gated delta networks"), and the short convolution that comes before it.

The state of a head is a matrix S, `[K, V]`. At each token it decays by `a = exp(g)`, and what it holds for the token's
key moves towards the token's value at the rate `beta`:

    S_t = a_t (I - beta_t k_t k_t^T) S_(t-1) + beta_t k_t v_t^T        y_t = S_t^T q_t

Tokens are processed in chunks. In a chunk that begins with the state S, token i writes `k_i u_i^T` into the state, with
`u_i = beta_i (v_i - k_i^T (state before it, decayed))`. These u solve a triangular system, so a chunk is a few matmuls
(section 3.3; the WY representation). The state after the chunk is `A S + B`, with A and B from the chunk alone.

Over sharded sequences each block of consecutive positions (see `parallel.context`) computes its own A and B. All shards
gather them, apply them in the order of the sequence, and take the states in which their blocks begin. The convolution
gathers the last inputs of each block in the same way.

All functions are for use inside a `shard_map`, and compute in float32.

Shape suffixes: B rows, T positions of a shard (of a block in arrays with L or M), L blocks of a shard, M = L * B rows
of blocks, N chunks, C positions of a chunk, G key heads, R value heads of a key head, H = G * R value heads, K key head
dim, V value head dim, W taps of the convolution. A suffix may leave out the last dimensions: `x_BT` is `[B, T, ...]`.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxinfra.parallel.context import SequenceSharding

CHUNK = 64
"""Positions of a chunk, as in the published implementation."""

_FORGET = -1e4
"""The logarithm of a decay that empties the state: its exponential is zero in float32."""

_einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def l2_normalize(x: jax.Array) -> jax.Array:
    """Divides the vectors in the last dimension by their length, as float32 (eps as in Qwen3-Next's published code)."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """The blocks of a shard of sequences, `[B, T, ...]`.

    Attributes:
        sharding: which positions each shard has.
        segments_BT: document ids; None if every row is one document.
    """

    sharding: SequenceSharding = SequenceSharding()
    segments_BT: jax.Array | None = None

    def split(self, x_BT: jax.Array) -> jax.Array:
        """Splits `[B, T, ...]` into blocks, `[L, B, T / L, ...]`."""
        count = self.sharding.blocks_per_shard
        return x_BT.reshape(len(x_BT), count, x_BT.shape[1] // count, *x_BT.shape[2:]).swapaxes(0, 1)

    def join(self, x_LBT: jax.Array) -> jax.Array:
        """Reverses `split`."""
        count, rows, length, *rest = x_LBT.shape
        return x_LBT.swapaxes(0, 1).reshape(rows, count * length, *rest)

    def to_rows(self, x_BT: jax.Array, *head_dims: int) -> jax.Array:
        """Splits `[B, T, heads, ...]` into rows of blocks, float32 `[M, T / L, *head_dims, ...]`."""
        x_LBT = self.split(x_BT.astype(jnp.float32))
        return x_LBT.reshape(-1, x_LBT.shape[2], *head_dims, *x_BT.shape[3:])

    def with_inputs_before(self, x_BT: jax.Array, count: int, before: jax.Array | None = None) -> jax.Array:
        """Returns each block with the `count` inputs before it, `[L, B, count + T / L, ...]`.

        The inputs before the sequence are `before`, `[B, count, ...]`; None is zeros.
        """
        x_LBT = self.split(x_BT)
        if before is None:
            before = jnp.zeros_like(x_LBT[0, :, :1], shape=(x_LBT.shape[1], count, *x_LBT.shape[3:]))
        if self.sharding.num_shards == 1:
            return jnp.concatenate([before[None], x_LBT], axis=2)
        # A block may be shorter than `count`: then the last inputs of the blocks are all inputs.
        kept = min(count, x_LBT.shape[2])
        last = self.sharding.gather_blocks(x_LBT[:, :, x_LBT.shape[2] - kept :])
        row = last.swapaxes(0, 1).reshape(last.shape[1], -1, *last.shape[3:])  # [B, all blocks x kept, ...]
        row = jnp.concatenate([before, row], axis=1)

        def add_before(x_BT: jax.Array, block: jax.Array) -> jax.Array:
            own = jax.lax.dynamic_slice_in_dim(row, block * kept, count, axis=1)
            return jnp.concatenate([own, x_BT], axis=1)

        own_blocks = self.sharding.own_blocks()
        return jnp.stack([add_before(x, own_blocks[index]) for index, x in enumerate(x_LBT)])

    def starts(self) -> jax.Array | None:
        """Returns whether a token is the first one of a document in its sequence, `[B, T]`."""
        if self.segments_BT is None:
            return None
        ids_LBT = self.with_inputs_before(self.segments_BT, 1)
        return self.join(ids_LBT[:, :, 1:] != ids_LBT[:, :, :-1])


def short_convolution(
    x_BTGK: jax.Array, weight_WGK: jax.Array, blocks: Blocks, before: jax.Array | None = None
) -> jax.Array:
    """Computes `silu(sum_w weight_w x_(t - W + 1 + w))` for each feature alone, over inputs of the same document.

    `before` has the `W - 1` inputs before the sequence, `[B, W - 1, G, K]`; None is zeros.
    """
    width = len(weight_WGK)
    x_LBT = blocks.with_inputs_before(x_BTGK, width - 1, before).astype(jnp.float32)
    ids_LBT = None if blocks.segments_BT is None else blocks.with_inputs_before(blocks.segments_BT, width - 1)
    length = x_LBT.shape[2] - width + 1
    total = jnp.zeros_like(x_LBT[:, :, width - 1 :])
    for tap, weight_GK in enumerate(weight_WGK.astype(jnp.float32)):
        inputs = x_LBT[:, :, tap : tap + length]
        if ids_LBT is not None:
            same = ids_LBT[:, :, tap : tap + length] == ids_LBT[:, :, width - 1 :]
            inputs = jnp.where(same[..., None, None], inputs, 0)
        total += inputs * weight_GK
    return blocks.join(jax.nn.silu(total)).astype(x_BTGK.dtype)


class _Chunks(NamedTuple):
    """The part of chunks that does not depend on the states before them: `[N, M, G, R, C, ...]`, for scans over N.

    Attributes:
        read: queries, multiplied by the decay since the start of the chunk, `[..., K]`.
        write: keys, multiplied by the decay until the end of the chunk, `[..., K]`.
        erase: the u of a chunk are `values - erase S` with the state S before it, `[..., K]`.
        values: the u of a chunk that begins with an empty state, `[..., V]`.
        scores: products of queries and keys of the chunk, decayed and causal, `[..., C]`.
        decay: the decay over the whole chunk, `[N, M, G, R]`.
    """

    read: jax.Array
    write: jax.Array
    erase: jax.Array
    values: jax.Array
    scores: jax.Array
    decay: jax.Array

    def final_states(self, state: jax.Array) -> jax.Array:
        """Returns the states after the last chunk, without outputs; `state` may have more columns than V."""

        def step(state: jax.Array, chunk: _Chunks) -> tuple[jax.Array, None]:
            return chunk.apply(state)[1], None

        return jax.lax.scan(step, state, self)[0]

    def apply(self, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the u of one chunk that begins with a state `[M, G, R, K, V]`, and the state after it.

        Further columns of the state get the u of values of zero.
        """
        wider = state.shape[-1] - self.values.shape[-1]
        u = jnp.pad(self.values, [(0, 0)] * (self.values.ndim - 1) + [(0, wider)]) - _einsum(
            "...ck,...kv->...cv", self.erase, state
        )
        return u, self.decay[..., None, None] * state + _einsum("...ck,...cv->...kv", self.write, u)


def _split_chunks(x_MT: jax.Array) -> jax.Array:
    """Splits `[M, T, ...]` into chunks `[N, M, C, ...]`; zeros fill the last one."""
    rows, length, *rest = x_MT.shape
    size = min(length, CHUNK)
    x_MT = jnp.pad(x_MT, [(0, 0), (0, -length % size)] + [(0, 0)] * len(rest))
    return x_MT.reshape(rows, -1, size, *rest).swapaxes(0, 1)


def _pair_decays(g: jax.Array) -> jax.Array:
    """Returns the decay from token j to token i, `[..., i, j]`, for logarithms `[..., C]`; zero for i before j."""
    # Differences of cumulative sums would lose digits where a document or a strong decay comes before.
    steps = jnp.where(jnp.tri(g.shape[-1], k=-1, dtype=bool), g[..., :, None], 0)
    return jnp.tril(jnp.exp(jnp.cumsum(steps, axis=-2)))


def _make_chunks(
    q_MTGK: jax.Array, k_MTGK: jax.Array, v_MTGRV: jax.Array, g_MTGR: jax.Array, beta_MTGR: jax.Array
) -> _Chunks:
    q, k, v = (jnp.moveaxis(_split_chunks(x), 2, -2) for x in (q_MTGK, k_MTGK, v_MTGRV))
    g, beta = (jnp.moveaxis(_split_chunks(x), 2, -1) for x in (g_MTGR, beta_MTGR))  # [N, M, G, R, C]
    q, k = q[:, :, :, None], k[:, :, :, None]  # [N, M, G, 1, C, K]
    pairs = _pair_decays(g)
    from_start = jnp.exp(g[..., :1]) * pairs[..., 0]
    # (I + L) u = beta (v - decayed k S), where L has the scores of each key with the keys before it, times their decay
    # and beta. The right side is linear in S, so it is solved for v and for k: then u is `values - erase S`.
    lower = beta[..., None] * _einsum("...ik,...jk->...ij", k, k) * pairs
    right = beta[..., None] * jnp.concatenate([v, from_start[..., None] * k], axis=-1)
    solved = jax.lax.linalg.triangular_solve(lower, right, left_side=True, lower=True, unit_diagonal=True)
    return _Chunks(
        read=from_start[..., None] * q,
        write=pairs[..., -1, :, None] * k,
        erase=solved[..., v.shape[-1] :],
        values=solved[..., : v.shape[-1]],
        scores=_einsum("...ik,...jk->...ij", q, k) * pairs,
        decay=from_start[..., -1],
    )


def _first_states(chunks: _Chunks, empty: jax.Array, sharding: SequenceSharding) -> jax.Array:
    """Returns the states in which the shard's blocks begin, `[M, G, R, K, V]`; the sequence begins with `empty`."""
    if sharding.num_shards == 1:
        return empty
    blocks, (rows, *rest) = sharding.blocks_per_shard, empty.shape
    *_, key_dim, value_dim = rest
    # A block maps a state S to `A S + B`, and further columns to A times them: so [empty | identity] to [B | A].
    identity = jnp.zeros_like(empty[..., :1]) + jnp.eye(key_dim, dtype=empty.dtype)
    local = chunks.final_states(jnp.concatenate([empty, identity], axis=-1))
    gathered = sharding.gather_blocks(local.reshape(blocks, rows // blocks, *local.shape[1:]))

    def step(state: jax.Array, block: jax.Array) -> tuple[jax.Array, jax.Array]:
        after = _einsum("...ij,...jv->...iv", block[..., value_dim:], state) + block[..., :value_dim]
        return after, state

    _, states = jax.lax.scan(step, empty[: rows // blocks], gathered)
    return states[sharding.own_blocks()].reshape(empty.shape)


def gated_delta_rule(
    q_BTGK: jax.Array,
    k_BTGK: jax.Array,
    v_BTHV: jax.Array,
    g_BTH: jax.Array,
    beta_BTH: jax.Array,
    *,
    blocks: Blocks = Blocks(),
    state_BHKV: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Applies the gated delta rule to a shard of sequences.

    Args:
        q_BTGK: queries.
        k_BTGK: keys; H is a multiple of G.
        v_BTHV: values.
        g_BTH: logarithms of the decay; not positive.
        beta_BTH: rates.
        blocks: the shard. The state is emptied where a document begins.
        state_BHKV: the state before the first token of an unsharded sequence; None is empty.

    Returns:
        The outputs, float32 `[B, T, H, V]`, and the state after the last token of each block, `[M, H, K, V]`.
    """
    assert state_BHKV is None or blocks.sharding.num_shards == 1
    heads, groups = v_BTHV.shape[2], q_BTGK.shape[2]
    starts_BT = blocks.starts()
    if starts_BT is not None:
        g_BTH = jnp.where(starts_BT[..., None], _FORGET, g_BTH)
    by_group = (groups, heads // groups)
    q, k = blocks.to_rows(q_BTGK, groups), blocks.to_rows(k_BTGK, groups)
    v, g, beta = (blocks.to_rows(x, *by_group) for x in (v_BTHV, g_BTH, beta_BTH))
    chunks = _make_chunks(q, k, v, g, beta)
    if state_BHKV is not None:
        state = state_BHKV.reshape(len(state_BHKV), *by_group, *state_BHKV.shape[2:])
    else:
        # Computed from keys and values, so that in the `shard_map` its type varies over the same mesh axes.
        empty = jnp.zeros_like(k[:, 0, :, None, :, None] * v[:, 0, :, :, None])
        state = _first_states(chunks, empty, blocks.sharding)

    def step(state: jax.Array, chunk: _Chunks) -> tuple[jax.Array, jax.Array]:
        u, after = chunk.apply(state)
        from_state = _einsum("...ck,...kv->...cv", chunk.read, state)
        return after, from_state + _einsum("...ij,...jv->...iv", chunk.scores, u)

    state, y = jax.lax.scan(step, state, chunks)  # y is [N, M, G, R, C, V]
    y_MTHV = jnp.moveaxis(y, (0, 4), (1, 2)).reshape(len(v), -1, heads, v.shape[-1])[:, : v.shape[1]]
    y_LBT = y_MTHV.reshape(blocks.sharding.blocks_per_shard, -1, *y_MTHV.shape[1:])
    return blocks.join(y_LBT), state.reshape(-1, heads, *state.shape[3:])
