"""Top-k routing of tokens to experts: choices, weights, capacity and load-balancing losses.

Everything is float32 and depends on one token or one sequence only, not on which tokens share a device, a microbatch or
a step. If scores are equal, the expert with the lower index is chosen.

The functions run inside a `shard_map`. `parallel.expert` sends tokens to their experts.

Shape suffixes: B sequences and T positions of a device, E experts, K choices of a token.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxinfra.parallel.context import SequenceSharding


@dataclass(frozen=True, kw_only=True)
class RoutingRule:
    """How tokens choose experts; `models.moe.MixtureOfExperts` explains the fields.

    Attributes:
        capacity: most tokens of a sequence that an expert takes; None is unlimited.
    """

    top_k: int
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    normalize_weights: bool = True
    routed_scaling_factor: float = 1.0
    num_groups: int = 1
    top_k_groups: int = 1
    capacity: int | None = None


class ExpertChoice(NamedTuple):
    """The experts of tokens.

    Attributes:
        experts: indices of the chosen experts, best first, int32 `[..., K]`.
        weights: weights of the experts' outputs, float32 `[..., K]`.
        scores: scores of all experts, normalized to sum to one, `[..., E]`; the balance loss uses them.
    """

    experts: jax.Array
    weights: jax.Array
    scores: jax.Array


def choose_experts(logits: jax.Array, rule: RoutingRule, bias_E: jax.Array | None = None) -> ExpertChoice:
    """Chooses the experts of every token from float32 router logits `[..., E]`.

    The bias affects the choice only, not the weights (Wang et al. 2024, "Auxiliary-loss-free load balancing").
    """
    softmax = rule.score_function == "softmax"
    scores = jax.nn.softmax(logits) if softmax else jax.nn.sigmoid(logits)
    biased = jax.lax.stop_gradient(scores if bias_E is None else scores + bias_E)
    if rule.top_k_groups < rule.num_groups:
        biased = _mask_groups(biased, rule)
    _, experts = jax.lax.top_k(biased, rule.top_k)
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if rule.normalize_weights:
        weights /= jnp.sum(weights, axis=-1, keepdims=True)
    normalized = scores if softmax else scores / jnp.sum(scores, axis=-1, keepdims=True)
    return ExpertChoice(experts, rule.routed_scaling_factor * weights, normalized)


def _mask_groups(biased: jax.Array, rule: RoutingRule) -> jax.Array:
    """Sets scores outside the best groups to minus infinity; the score of a group is the sum of its two best scores."""
    by_group = biased.reshape(*biased.shape[:-1], rule.num_groups, -1)
    group_scores = jnp.sum(jax.lax.top_k(by_group, 2)[0], axis=-1)
    _, best = jax.lax.top_k(group_scores, rule.top_k_groups)
    keep = jnp.any(best[..., None] == jnp.arange(rule.num_groups), axis=-2)
    return jnp.where(keep[..., None], by_group, -jnp.inf).reshape(biased.shape)


def expert_mask(experts_BTK: jax.Array, num_experts: int) -> jax.Array:
    """Returns whether a token chooses an expert, bool `[B, T, E]`."""
    return jnp.any(experts_BTK[..., None] == jnp.arange(num_experts), axis=2)


def within_capacity(
    experts_BTK: jax.Array, mask_BTE: jax.Array, capacity: int, sharding: SequenceSharding
) -> jax.Array:
    """Returns which choices are served, bool `[B, T, K]`: each expert takes the first `capacity` of a sequence.

    A token's result never depends on later tokens. T counts the positions of the device's shard of `sharding`.
    """
    blocks = range(sharding.blocks_per_shard)
    chosen = jnp.stack(jnp.split(mask_BTE.astype(jnp.int32), len(blocks), axis=1), axis=1)  # [B, blocks, T / blocks, E]
    earlier = jnp.cumsum(chosen, axis=2) - chosen  # choices of each expert by earlier tokens of the same block
    if sharding.num_shards > 1:
        own_shard, shards = jax.lax.axis_index(sharding.axes), jnp.arange(sharding.num_shards)
        counts = jax.lax.all_gather(jnp.sum(chosen, axis=2), sharding.axes, axis=1)  # [B, shards, blocks, E]
        block_of = jnp.stack([sharding.block_index(shards, block) for block in blocks], axis=1)  # [shards, blocks]
        own_block = jnp.stack([sharding.block_index(own_shard, block) for block in blocks])
        precedes = block_of[None] < own_block[:, None, None]  # [own blocks, shards, blocks]
        # Adds the counts of all blocks p on all shards s that precede the own block q.
        earlier += jnp.einsum("bspe,qsp->bqe", counts, precedes.astype(jnp.int32))[:, :, None]
    earlier_BTE = earlier.reshape(mask_BTE.shape)
    return jnp.take_along_axis(earlier_BTE, experts_BTK, axis=2) < capacity


def load_balance_loss(mask_BTE: jax.Array, scores_BTE: jax.Array, top_k: int, sharding: SequenceSharding) -> jax.Array:
    """Computes the sequence-wise balance loss of DeepSeek-V3 (section 2.1.2, equations 17 to 20), times the length.

    For each sequence it is `sum over experts of f * P`: f is the expert's fraction of the choices and P the mean of its
    scores, scaled so that an even load costs 1 per token. Here f counts the actual choices, made with biases. The
    scalar is the part of this device's positions.
    """
    count_BE = jnp.sum(mask_BTE, axis=1, dtype=jnp.float32)
    if sharding.num_shards > 1:
        count_BE = jax.lax.psum(count_BE, sharding.axes)
    length, num_experts = mask_BTE.shape[1] * sharding.num_shards, mask_BTE.shape[2]
    share_BE = jax.lax.stop_gradient(count_BE) * (num_experts / (top_k * length))
    return jnp.sum(share_BE * jnp.sum(scores_BTE, axis=1))


def router_z_loss(logits: jax.Array) -> jax.Array:
    """Sums the squared log-sum-exp of the logits over tokens (Zoph et al. 2022, ST-MoE, equation 5)."""
    return jnp.sum(jnp.square(jax.nn.logsumexp(logits, axis=-1)))
