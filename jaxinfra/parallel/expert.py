"""Dispatches tokens to experts on other devices and combines the results, inside a `shard_map`.

A *choice* is one of the experts that a token is routed to: with K choices per token, choice `n * K + k` is the k-th
expert of token n. Each device sorts its choices by expert and sends every shard of experts the rows for it (an
all-to-all). The shard sorts the rows that it receives by expert. `combine` goes the same way back. Results return in
the order of choices, so a token sums them in the same order on every mesh.

TPUs and GPUs send exact sizes (`jax.lax.ragged_all_to_all`); CPUs pad the rows for each shard to `max_rows`. The
inverse of every gather is known, so its gradient is a gather too, not a slow scatter-add.

Shape suffixes: N tokens of a device, K choices of a token, A = N * K, E experts, P shards of experts, each on a device
that also sends rows, O experts of one shard (so PPO is sender, shard, expert), S rows sent, R rows received, in the
order in which they arrive, M the same rows sorted by expert, D features. In gathers: I input rows, J output rows.
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
        max_rows: largest number of rows that one device can send to one shard; not used with one shard.
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


class ExpertDispatch(NamedTuple):
    """How the tokens of one layer reach their experts and return.

    Attributes:
        num_choices: K, the number of choices of a token.
        choice_S: the choice in each row to send, or `NO_ROW`.
        row_A: the row of each choice, or `NO_ROW`; the inverse of `choice_S`.
        group_sizes: rows of each of the device's own experts, int32 `[O]`.
        send: maps the rows to send `[S, D]` to the rows of the device's own experts `[M, D]`, sorted by expert.
        send_back: maps `[M, D]` to `[S, D]`.
    """

    num_choices: int
    choice_S: jax.Array
    row_A: jax.Array
    group_sizes: jax.Array
    send: Callable[[jax.Array], jax.Array]
    send_back: Callable[[jax.Array], jax.Array]

    def dispatch(self, x_ND: jax.Array) -> jax.Array:
        """Maps tokens `[N, D]` to the rows of the device's own experts `[M, D]`, sorted by expert."""
        token_S = self.choice_S // self.num_choices  # `NO_ROW` stays -1
        return self.send(gather_rows(x_ND, token_S, self.row_A, self.num_choices))

    def dispatch_choices(self, x_NKD: jax.Array) -> jax.Array:
        """Maps one row per choice `[N, K, D]` to the rows of the device's own experts `[M, D]`, sorted by expert."""
        x_AD = x_NKD.reshape(-1, x_NKD.shape[2])
        return self.send(gather_rows(x_AD, self.choice_S, self.row_A, 1))

    def combine(self, y_MD: jax.Array) -> jax.Array:
        """Maps the experts' outputs `[M, D]` to one output per choice, `[N, K, D]`."""
        y_AD = gather_rows(self.send_back(y_MD), self.row_A, self.choice_S, 1)
        return y_AD.reshape(-1, self.num_choices, y_AD.shape[1])


def plan_dispatch(placement: ExpertPlacement, expert_NK: jax.Array) -> ExpertDispatch:
    """Plans the exchange for the choices `expert_NK`, int32; the expert `num_experts` marks a dropped choice."""
    num_choices, expert_A = expert_NK.shape[1], expert_NK.reshape(-1)
    choices = sort_by_expert(expert_A, placement.num_experts)
    if placement.num_shards == 1:  # nothing is sent
        return ExpertDispatch(
            num_choices, choices.order, choices.position, choices.counts, lambda x_SD: x_SD, lambda y_MD: y_MD
        )
    counts_PE = jax.lax.all_gather(choices.counts, placement.axes)
    # The rows that each device sends to each expert of each shard.
    counts_PPO = counts_PE.reshape(placement.num_shards, placement.num_shards, placement.experts_per_shard)
    if placement.ragged:
        return _ragged_dispatch(placement, num_choices, choices, counts_PPO)
    return _padded_dispatch(placement, num_choices, choices, counts_PPO, expert_A)


# Sorting and gathering


class SortedByExpert(NamedTuple):
    """Choices or rows, sorted by expert.

    Attributes:
        order: what is at each position; `NO_ROW` at the end for those that were dropped.
        position: the position of each; `NO_ROW` if it was dropped.
        counts: number for each expert.
    """

    order: jax.Array
    position: jax.Array
    counts: jax.Array


def sort_by_expert(expert_A: jax.Array, num_experts: int) -> SortedByExpert:
    """Sorts stably; the expert `num_experts` marks what is dropped.

    Example: experts `[1, 2, 0, 1]`, of which 2 is dropped, have the order `[2, 0, 3, NO_ROW]`, the position
    `[1, NO_ROW, 0, 2]` and the counts `[1, 2]`.
    """
    order_A = jnp.argsort(expert_A, stable=True).astype(jnp.int32)
    place_A = jnp.arange(len(expert_A), dtype=jnp.int32)
    position_A = jnp.zeros_like(order_A).at[order_A].set(place_A, unique_indices=True)
    counts_E = jnp.sum(expert_A[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    return SortedByExpert(
        order=jnp.where(place_A < jnp.sum(counts_E), order_A, NO_ROW),
        position=jnp.where(expert_A < num_experts, position_A, NO_ROW),
        counts=counts_E,
    )


def _gather_or_zero(x_ID: jax.Array, index_J: jax.Array) -> jax.Array:
    return jnp.where(index_J[:, None] == NO_ROW, 0, x_ID.at[index_J].get(mode="clip"))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def gather_rows(x_ID: jax.Array, index_J: jax.Array, inverse: jax.Array, num_choices: int) -> jax.Array:
    """Returns `x_ID[index_J]`, with zeros for `NO_ROW`; a row appears at most `num_choices` times.

    `inverse` `[I * num_choices]` has the places of each row in `index_J`, or `NO_ROW`. With them the gradient is a
    gather too, summed in float32 over the places of a row.
    """
    return _gather_or_zero(x_ID, index_J)


def _gather_rows_forward(x_ID, index_J, inverse, num_choices):
    return _gather_or_zero(x_ID, index_J), inverse


def _gather_rows_backward(num_choices, inverse, dy_JD):
    if num_choices == 1:
        return _gather_or_zero(dy_JD, inverse), None, None
    dy_IKD = _gather_or_zero(dy_JD, inverse).reshape(-1, num_choices, dy_JD.shape[1])
    return jnp.sum(dy_IKD, axis=1, dtype=jnp.float32).astype(dy_JD.dtype), None, None


gather_rows.defvjp(_gather_rows_forward, _gather_rows_backward)


# The exchange of rows; `counts_PPO` has the rows that each device sends to each expert of each shard


def _exclusive_cumsum(sizes: jax.Array, axis: int) -> jax.Array:
    """Returns the start of each part from the sizes of the parts: `[2, 3, 1]` to `[0, 2, 5]`."""
    return jnp.cumsum(sizes, axis=axis) - sizes


def _padded_dispatch(
    placement: ExpertPlacement,
    num_choices: int,
    choices: SortedByExpert,
    counts_PPO: jax.Array,
    expert_A: jax.Array,
) -> ExpertDispatch:
    """Sends `max_rows` rows to each shard: rows `p * max_rows` and up are for shard p, zeros after its choices."""
    num_rows, shard = placement.num_shards * placement.max_rows, jax.lax.axis_index(placement.axes)
    first_P = _exclusive_cumsum(jnp.sum(counts_PPO[shard], axis=1), 0)  # first position of each shard's choices
    shard_A = jnp.minimum(expert_A // placement.experts_per_shard, placement.num_shards - 1)
    row_A = shard_A * placement.max_rows + choices.position - first_P[shard_A]
    row_A = jnp.where(choices.position == NO_ROW, NO_ROW, row_A)
    target_A = jnp.where(row_A == NO_ROW, num_rows, row_A)  # out of bounds, so it is not written
    choice_A = jnp.arange(len(row_A), dtype=jnp.int32)
    choice_S = jnp.full(num_rows, NO_ROW, jnp.int32).at[target_A].set(choice_A, mode="drop")
    # The rows from one sender are sorted by expert, so the expert of row r is the number of experts whose rows end at
    # or before r: with counts [2, 1] and max_rows 4 the experts are [0, 0, 1, 2], where 2 is padding.
    ends_PO = jnp.cumsum(counts_PPO[:, shard], axis=1)
    expert_PR = jnp.sum(jnp.arange(placement.max_rows)[:, None] >= ends_PO[:, None, :], axis=-1)
    received = sort_by_expert(expert_PR.reshape(-1), placement.experts_per_shard)
    all_to_all = partial(jax.lax.all_to_all, axis_name=placement.axes, split_axis=0, concat_axis=0, tiled=True)
    return ExpertDispatch(
        num_choices,
        choice_S,
        row_A,
        received.counts,
        send=lambda x_SD: gather_rows(all_to_all(x_SD), received.order, received.position, 1),
        send_back=lambda y_MD: all_to_all(gather_rows(y_MD, received.position, received.order, 1)),
    )


class AllToAllSizes(NamedTuple):
    """Arguments of `jax.lax.ragged_all_to_all`, each `[P * O]`: one entry for each expert of each shard."""

    input_offsets: jax.Array
    send_sizes: jax.Array
    output_offsets: jax.Array
    recv_sizes: jax.Array


def _ragged_dispatch(
    placement: ExpertPlacement, num_choices: int, choices: SortedByExpert, counts_PPO: jax.Array
) -> ExpertDispatch:
    """Sends each shard only the rows for it; they arrive sorted by expert, then by sender."""
    shard, counts_PE = jax.lax.axis_index(placement.axes), counts_PPO.reshape(placement.num_shards, -1)
    # Where the rows of each sender for each expert start: among its own rows, and among the rows of the expert's shard.
    sent_from_PPO = _exclusive_cumsum(counts_PE, 1).reshape(counts_PPO.shape)
    expert_start_PO = _exclusive_cumsum(jnp.sum(counts_PPO, axis=0), 1)  # in the rows that a shard receives
    before_sender_PPO = _exclusive_cumsum(counts_PPO, 0)  # rows for the same expert from earlier senders
    sent_to_PPO = expert_start_PO + before_sender_PPO
    # Index `shard` of dimension 0, the sender, selects what this device sends; of dimension 1, the shard of experts,
    # what it receives. `recv_from` are places in the rows of the senders, `recv_to` in the rows that it receives.
    select = partial(jax.lax.dynamic_index_in_dim, index=shard, keepdims=False)
    send_from, send_size, send_to = (select(x, axis=0).reshape(-1) for x in (sent_from_PPO, counts_PPO, sent_to_PPO))
    recv_from, recv_size, recv_to = (select(x, axis=1).reshape(-1) for x in (sent_from_PPO, counts_PPO, sent_to_PPO))
    sizes = AllToAllSizes(send_from, send_size, send_to, recv_size)
    reverse = AllToAllSizes(recv_to, recv_size, recv_from, send_size)
    # Sliced from `counts_PE`: from `counts_PPO` the TPU compiler makes more temporaries.
    experts = placement.experts_per_shard
    counts_PO = jax.lax.dynamic_slice_in_dim(counts_PE, shard * experts, experts, axis=1)
    num_sent, num_received = len(choices.order), placement.num_shards * placement.max_rows
    return ExpertDispatch(
        num_choices,
        choices.order,
        choices.position,
        jnp.sum(counts_PO, axis=0),
        send=lambda x_SD: _ragged_exchange(placement.axes, num_received, x_SD, sizes, reverse),
        send_back=lambda y_MD: _ragged_exchange(placement.axes, num_sent, y_MD, reverse, sizes),
    )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ragged_exchange(
    axes: tuple[str, ...], num_rows: int, x_SD: jax.Array, sizes: AllToAllSizes, reverse: AllToAllSizes
) -> jax.Array:
    """Exchanges rows; returns a buffer of `num_rows` rows. The gradient is exchanged with the `reverse` sizes."""
    buffer = jnp.zeros_like(x_SD, shape=(num_rows, x_SD.shape[1]))
    return jax.lax.ragged_all_to_all(x_SD, buffer, *sizes, axis_name=axes)


def _ragged_exchange_forward(axes, num_rows, x_SD, sizes, reverse):
    return _ragged_exchange(axes, num_rows, x_SD, sizes, reverse), (len(x_SD), sizes, reverse)


def _ragged_exchange_backward(axes, num_rows, residuals, dy_RD):
    num_sent, sizes, reverse = residuals
    return _ragged_exchange(axes, num_sent, dy_RD, reverse, sizes), None, None


_ragged_exchange.defvjp(_ragged_exchange_forward, _ragged_exchange_backward)
