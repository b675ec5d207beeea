"""Dispatches tokens to experts on other devices and combines the results, inside a `shard_map`.

A choice is one of the experts that a token is routed to. Each device sorts the choices of its tokens by expert and
sends each shard of experts its rows (an all-to-all). `combine` is the reverse exchange: results return in the original
order of choices, so a token sums them in the same order on every mesh.

TPUs send exact sizes (`jax.lax.ragged_all_to_all`); other platforms pad each send to `max_rows`. The inverse of every
gather is known, so its gradient is a gather too, not a slow scatter-add.

Shape suffixes: N tokens of a device, K choices of a token, A = N * K, E experts, P shards of experts, O experts of one
shard, S rows sent, R rows received, M rows of the device's own experts, D features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

NO_ROW = -1
"""The index of an empty row; gathering it gives zeros."""


@dataclass(frozen=True, kw_only=True)
class ExpertPlacement:
    """Assigns experts to shards: expert e is on shard `e // experts_per_shard`.

    Attributes:
        num_experts: number of experts of the layer.
        axes: mesh axes that shard the experts; axes of size 1 are left out.
        num_shards: number of shards of the experts; with 1 nothing is sent.
        max_rows: largest number of rows that one device can send to one shard.
        ragged: whether the platform has `jax.lax.ragged_all_to_all`.
    """

    num_experts: int
    axes: tuple[str, ...] = ()
    num_shards: int = 1
    max_rows: int = 0
    ragged: bool = False

    @property
    def experts_per_shard(self) -> int:
        """Number of experts of one shard."""
        return self.num_experts // self.num_shards


# Gathers whose gradients are gathers


def _gather_rows(x_RD: jax.Array, index_S: jax.Array) -> jax.Array:
    return jnp.where(index_S[:, None] == NO_ROW, 0, x_RD.at[index_S].get(mode="clip"))


@jax.custom_vjp
def permute_rows(x_RD: jax.Array, index_S: jax.Array, inverse_R: jax.Array) -> jax.Array:
    """Returns `x_RD[index_S]`; no row appears twice, and `inverse_R` is the inverse index."""
    return _gather_rows(x_RD, index_S)


permute_rows.defvjp(
    lambda x_RD, index_S, inverse_R: (_gather_rows(x_RD, index_S), inverse_R),
    lambda inverse_R, dy_SD: (_gather_rows(dy_SD, inverse_R), None, None),
)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def gather_tokens(x_ND: jax.Array, choice_S: jax.Array, inverse_A: jax.Array, num_choices: int) -> jax.Array:
    """Returns the token of each choice, `[S, D]`; choice `n * num_choices + k` belongs to token n.

    The gradients of a token's choices are summed in float32.
    """
    return _gather_rows(x_ND, choice_S // num_choices)


def _gather_tokens_backward(num_choices, inverse_A, dy_SD):
    dy_NKD = _gather_rows(dy_SD, inverse_A).reshape(-1, num_choices, dy_SD.shape[1])
    return jnp.sum(dy_NKD, axis=1, dtype=jnp.float32).astype(dy_SD.dtype), None, None


gather_tokens.defvjp(
    lambda x_ND, choice_S, inverse_A, num_choices: (_gather_rows(x_ND, choice_S // num_choices), inverse_A),
    _gather_tokens_backward,
)


# The ragged all-to-all


class AllToAllSizes(NamedTuple):
    """Arguments of `jax.lax.ragged_all_to_all`, each `[P * O]`: one entry for each expert of each shard."""

    input_offsets: jax.Array
    send_sizes: jax.Array
    output_offsets: jax.Array
    recv_sizes: jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ragged_exchange(
    axes: tuple[str, ...], rows: int, x_SD: jax.Array, sizes: AllToAllSizes, reverse: AllToAllSizes
) -> jax.Array:
    """Exchanges rows; returns a buffer of length `rows`. The gradient is exchanged with `reverse`."""
    buffer = jnp.zeros_like(x_SD, shape=(rows, x_SD.shape[1]))
    return jax.lax.ragged_all_to_all(x_SD, buffer, *sizes, axis_name=axes)


def _ragged_exchange_forward(axes, rows, x_SD, sizes, reverse):
    return _ragged_exchange(axes, rows, x_SD, sizes, reverse), (len(x_SD), sizes, reverse)


def _ragged_exchange_backward(axes, rows, residuals, dy_RD):
    rows_sent, sizes, reverse = residuals
    return _ragged_exchange(axes, rows_sent, dy_RD, reverse, sizes), None, None


_ragged_exchange.defvjp(_ragged_exchange_forward, _ragged_exchange_backward)


# Dispatch and combine


class ExpertDispatch(NamedTuple):
    """How the tokens of one layer reach their experts and return.

    Attributes:
        group_sizes: rows of each of the device's own experts, int32 `[O]`.
        dispatch: maps tokens `[N, D]` to the rows of the device's own experts `[M, D]`, sorted by expert.
        combine: maps the experts' outputs `[M, D]` to one output per choice, `[N, K, D]`.
    """

    group_sizes: jax.Array
    dispatch: Callable[[jax.Array], jax.Array]
    combine: Callable[[jax.Array], jax.Array]


class SortedChoices(NamedTuple):
    """The choices of a device's tokens, sorted by expert.

    Attributes:
        order: choices in the order of their experts, dropped choices last, `[A]`.
        position: index of each choice in `order`, `[A]`.
        counts: number of choices of each expert, `[E]`.
    """

    order: jax.Array
    position: jax.Array
    counts: jax.Array


def sort_by_expert(expert_A: jax.Array, num_experts: int) -> SortedChoices:
    """Sorts choices by expert, stably; the expert `num_experts` marks a dropped choice."""
    order = jnp.argsort(expert_A, stable=True).astype(jnp.int32)
    position = jnp.zeros_like(order).at[order].set(jnp.arange(len(order), dtype=jnp.int32), unique_indices=True)
    counts = jnp.sum(expert_A[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    return SortedChoices(order, position, counts)


def plan_dispatch(placement: ExpertPlacement, expert_NK: jax.Array) -> ExpertDispatch:
    """Plans the exchange for the choices `expert_NK`, int32; the expert `num_experts` marks a dropped choice."""
    num_choices, expert_A = expert_NK.shape[1], expert_NK.reshape(-1)
    choices = sort_by_expert(expert_A, placement.num_experts)
    if placement.num_shards == 1 or placement.ragged:
        is_kept = jnp.arange(len(expert_A)) < jnp.sum(choices.counts)
        sent_S = jnp.where(is_kept, choices.order, NO_ROW)
        inverse_A = jnp.where(expert_A < placement.num_experts, choices.position, NO_ROW)
    else:
        sent_S, inverse_A = _padded_send_index(placement, expert_A, choices)

    def to_rows(x_ND: jax.Array) -> jax.Array:
        return gather_tokens(x_ND, sent_S, inverse_A, num_choices)

    def to_choices(y_SD: jax.Array) -> jax.Array:
        return permute_rows(y_SD, inverse_A, sent_S).reshape(*expert_NK.shape, y_SD.shape[1])

    if placement.num_shards == 1:
        return ExpertDispatch(choices.counts, to_rows, to_choices)
    counts_PE = jax.lax.all_gather(choices.counts, placement.axes)  # choices that each device has for each expert
    shard, own_experts = jax.lax.axis_index(placement.axes), placement.experts_per_shard
    counts_PO = jax.lax.dynamic_slice_in_dim(counts_PE, shard * own_experts, own_experts, axis=1)
    if placement.ragged:
        sizes, reverse = _ragged_sizes(placement, counts_PE, shard)
        received = placement.num_shards * placement.max_rows
        return ExpertDispatch(
            jnp.sum(counts_PO, axis=0),
            lambda x_ND: _ragged_exchange(placement.axes, received, to_rows(x_ND), sizes, reverse),
            lambda y_MD: to_choices(_ragged_exchange(placement.axes, len(sent_S), y_MD, reverse, sizes)),
        )
    index_M, inverse_R = _padded_receive_index(placement, counts_PO)
    exchange = partial(jax.lax.all_to_all, axis_name=placement.axes, split_axis=0, concat_axis=0, tiled=True)
    return ExpertDispatch(
        jnp.sum(counts_PO, axis=0),
        lambda x_ND: permute_rows(exchange(to_rows(x_ND)), index_M, inverse_R),
        lambda y_MD: to_choices(exchange(permute_rows(y_MD, inverse_R, index_M))),
    )


def _exclusive_cumsum(sizes: jax.Array, axis: int) -> jax.Array:
    return jnp.cumsum(sizes, axis=axis) - sizes


def _padded_send_index(
    placement: ExpertPlacement, expert_A: jax.Array, choices: SortedChoices
) -> tuple[jax.Array, jax.Array]:
    """Returns the choice of each sent row, `[P * max_rows]`, and the sent row of each choice, `[A]`."""
    sizes_P = jnp.sum(choices.counts.reshape(placement.num_shards, placement.experts_per_shard), axis=1)
    starts_P, row = _exclusive_cumsum(sizes_P, 0), jnp.arange(placement.max_rows)
    index = jnp.minimum(starts_P[:, None] + row, len(expert_A) - 1)
    sent_S = jnp.where(row < sizes_P[:, None], choices.order[index], NO_ROW).reshape(-1)
    shard_A = jnp.minimum(expert_A // placement.experts_per_shard, placement.num_shards - 1)
    row_A = shard_A * placement.max_rows + choices.position - starts_P[shard_A]
    return sent_S, jnp.where(expert_A < placement.num_experts, row_A, NO_ROW)


def _receive_offsets(counts_PO: jax.Array) -> jax.Array:
    """Returns where each device's rows for each expert start on their shard, sorted by expert, then by device."""
    return _exclusive_cumsum(jnp.sum(counts_PO, axis=0), 0) + _exclusive_cumsum(counts_PO, 0)


def _padded_receive_index(placement: ExpertPlacement, counts_PO: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the received row of each sorted row, and the inverse; both `[P * max_rows]`."""
    ends_PO, row = jnp.cumsum(counts_PO, axis=1), jnp.arange(placement.max_rows)
    expert_PR = jnp.sum(row[None, :, None] >= ends_PO[:, None, :], axis=-1)
    is_padding_PR = expert_PR == placement.experts_per_shard
    expert_PR = jnp.minimum(expert_PR, placement.experts_per_shard - 1)
    first_PO = _receive_offsets(counts_PO) - _exclusive_cumsum(counts_PO, 1)
    sorted_PR = jnp.take_along_axis(first_PO, expert_PR, axis=1) + row
    inverse_R = jnp.where(is_padding_PR, NO_ROW, sorted_PR).reshape(-1)
    received = placement.num_shards * placement.max_rows
    target_R = jnp.where(inverse_R == NO_ROW, received, inverse_R)  # padding is out of bounds, and dropped
    index_M = (
        jnp.full_like(inverse_R, NO_ROW).at[target_R].set(jnp.arange(received, dtype=inverse_R.dtype), mode="drop")
    )
    return index_M, inverse_R


def _ragged_sizes(
    placement: ExpertPlacement, counts_PE: jax.Array, shard: jax.Array
) -> tuple[AllToAllSizes, AllToAllSizes]:
    """Returns the sizes of the exchange to the experts, and of the reverse exchange."""
    # Dimensions: sending device, shard of experts, expert of that shard.
    sizes_PPO = counts_PE.reshape(placement.num_shards, placement.num_shards, placement.experts_per_shard)
    send_offsets_PPO = _exclusive_cumsum(counts_PE, 1).reshape(sizes_PPO.shape)
    receive_offsets_PPO = jax.vmap(_receive_offsets, in_axes=1, out_axes=1)(sizes_PPO)

    def sent(x_PPO: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(x_PPO, shard, axis=0, keepdims=False).reshape(-1)

    def received(x_PPO: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(x_PPO, shard, axis=1, keepdims=False).reshape(-1)

    forward = AllToAllSizes(sent(send_offsets_PPO), sent(sizes_PPO), sent(receive_offsets_PPO), received(sizes_PPO))
    reverse = AllToAllSizes(
        received(receive_offsets_PPO), received(sizes_PPO), received(send_offsets_PPO), sent(sizes_PPO)
    )
    return forward, reverse
