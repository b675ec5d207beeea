"""Which experts a token chooses, with what weight, and what the choices of all tokens cost.

Everything is float32, of one token or of one sequence: nothing depends on which tokens share a device, a microbatch or
a step. Among equal scores the expert of the lower number is chosen.

Happens inside a `shard_map`. Not for the way to the experts (see `parallel.expert`).

Shape suffixes: B sequences, T positions, N = B * T tokens, all of a device; E experts, K choices, G groups.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxinfra.parallel.context import SequenceSharding


@dataclass(frozen=True, kw_only=True)
class Routing:
    """The rule by which tokens choose.

    Attributes:
        chosen: experts of a token.
        score: what becomes of logits: "softmax" over the experts, or "sigmoid" of each.
        normalise: the weights of a token's choices sum to one.
        scale: factor on the weights.
        groups: of consecutive experts; a token chooses in `chosen_groups` of them alone (DeepSeek-V3, section 2.1.2):
            those where the two best scores have the largest sum.
        chosen_groups: see `groups`.
        capacity: choices of a sequence that an expert takes at most, the earlier positions first; None is all.
    """

    chosen: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalise: bool = True
    scale: float = 1.0
    groups: int = 1
    chosen_groups: int = 1
    capacity: int | None = None


class Choices(NamedTuple):
    """What tokens choose.

    Attributes:
        experts: `[..., K]`, int32; the best first.
        weights: of their experts' outputs, float32 `[..., K]`.
        scores: of all experts, as shares of their sum, `[..., E]`: what balance is judged by.
    """

    experts: jax.Array
    weights: jax.Array
    scores: jax.Array


def choose(logits: jax.Array, routing: Routing, bias_E: jax.Array | None = None) -> Choices:
    """The experts of every token, from float32 logits `[..., E]`.

    The bias is added to scores where experts are compared, and nowhere else (Wang et al. 2024, "Auxiliary-loss-free
    load balancing").
    """
    softmax = routing.score == "softmax"
    scores = jax.nn.softmax(logits) if softmax else jax.nn.sigmoid(logits)
    compared = jax.lax.stop_gradient(scores if bias_E is None else scores + bias_E)
    if routing.chosen_groups < routing.groups:
        compared = _in_best_groups(compared, routing)
    _, experts = jax.lax.top_k(compared, routing.chosen)
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if routing.normalise:
        weights /= jnp.sum(weights, axis=-1, keepdims=True)
    shares = scores if softmax else scores / jnp.sum(scores, axis=-1, keepdims=True)
    return Choices(experts, routing.scale * weights, shares)


def _in_best_groups(compared: jax.Array, routing: Routing) -> jax.Array:
    """Scores of experts outside of the best groups as minus infinity."""
    by_group = compared.reshape(*compared.shape[:-1], routing.groups, -1)
    of_group = jnp.sum(jax.lax.top_k(by_group, 2)[0], axis=-1)
    _, best = jax.lax.top_k(of_group, routing.chosen_groups)
    kept = jnp.any(best[..., None] == jnp.arange(routing.groups), axis=-2)
    return jnp.where(kept[..., None], by_group, -jnp.inf).reshape(compared.shape)


def chosen_by(experts_BTK: jax.Array, count: int) -> jax.Array:
    """Whether a token chooses an expert, bool `[B, T, E]`."""
    return jnp.any(experts_BTK[..., None] == jnp.arange(count), axis=2)


def within_capacity(
    experts_BTK: jax.Array, chosen_BTE: jax.Array, capacity: int, sharding: SequenceSharding
) -> jax.Array:
    """Which choices an expert takes: of each sequence those of the first `capacity` positions that choose it.

    What becomes of a token never depends on later ones. The device has the positions of its shard (see `sharding`).
    """
    pieces = jnp.stack(jnp.split(chosen_BTE.astype(jnp.int32), sharding.blocks_per_shard, axis=1), axis=1)
    before = jnp.cumsum(pieces, axis=2) - pieces  # in the piece
    if sharding.num_shards > 1:
        me = jax.lax.axis_index(sharding.axes)
        by_shard = jax.lax.all_gather(jnp.sum(pieces, axis=2), sharding.axes, axis=1)  # [B, shards, pieces, E]
        shards = jnp.arange(sharding.num_shards)
        blocks = jnp.stack([sharding.block_index(shards, piece) for piece in range(sharding.blocks_per_shard)], axis=1)
        own = jnp.stack([sharding.block_index(me, piece) for piece in range(sharding.blocks_per_shard)])
        earlier = blocks[None] < own[:, None, None]  # [own pieces, shards, pieces]
        before += jnp.einsum("bspe,qsp->bqe", by_shard, earlier.astype(jnp.int32))[:, :, None]
    before_BTE = before.reshape(chosen_BTE.shape)
    return jnp.take_along_axis(before_BTE, experts_BTK, axis=2) < capacity


def balance(chosen_BTE: jax.Array, scores_BTE: jax.Array, chosen: int, sharding: SequenceSharding) -> jax.Array:
    """The sequence-wise balance loss of DeepSeek-V3 (section 2.1.2, equations 17 to 20), times the sequence's length.

    For each sequence `sum over experts of f * P`: f is the share of choices that an expert got, P the mean of its
    scores, both times the number of experts or tokens, so that even choices make a loss of one a token. Here f counts
    what tokens really choose, biases included. The scalar is the device's part: other shards' positions are not in it.
    """
    count = jnp.sum(chosen_BTE, axis=1, dtype=jnp.float32)
    if sharding.num_shards > 1:
        count = jax.lax.psum(count, sharding.axes)
    length, experts = chosen_BTE.shape[1] * sharding.num_shards, chosen_BTE.shape[2]
    share_BE = jax.lax.stop_gradient(count) * (experts / (chosen * length))
    return jnp.sum(share_BE * jnp.sum(scores_BTE, axis=1))


def z_loss(logits: jax.Array) -> jax.Array:
    """The sum over tokens of the squared log-normaliser of their logits (Zoph et al. 2022, ST-MoE, equation 5)."""
    return jnp.sum(jnp.square(jax.nn.logsumexp(logits, axis=-1)))
