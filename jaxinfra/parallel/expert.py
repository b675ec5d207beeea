"""The way of tokens to their experts, which live on other devices, and back.

Every device sorts the choices of its own tokens by expert, sends each shard of experts its part, and gets from all of
them the rows of its own experts, sorted. What the experts make of the rows goes the same way back, each to the place in
its token's list of choices from which it came: whoever adds them up does so in one order on every mesh.

Two forms of the transfer give the same rows. Where the platform has `jax.lax.ragged_all_to_all` (TPU) a device sends
what there is and no more. Elsewhere parts are padded to the most that one device can send to one other.

All gathers here have an inverse that is known: a gradient is gathered, too, and never scattered and added.

All of it happens inside a `shard_map`. Not for which experts a token chooses (see `ops.routing`), nor for what they do.

Shape suffixes: N tokens of a device, K choices of a token, A = N * K, E experts, P shards of experts, S rows that are
sent, R rows that arrive, M rows of a device's own experts, D features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

NONE = -1
"""Stands for no row."""


@dataclass(frozen=True, kw_only=True)
class Homes:
    """Where experts live: expert e on shard `e // own`.

    Attributes:
        count: experts.
        axes: mesh axes that they are spread over, each of more than one device.
        shards: into how many shards; 1 sends nothing.
        most: rows that one device sends to one shard at most.
        ragged: whether the platform sends parts of unequal size.
    """

    count: int
    axes: tuple[str, ...] = ()
    shards: int = 1
    most: int = 0
    ragged: bool = False

    @property
    def own(self) -> int:
        """Experts of one shard."""
        return self.count // self.shards


# Gathers with known inverses


def _rows(x_RD: jax.Array, index_S: jax.Array) -> jax.Array:
    """The rows of these numbers; zeros for `NONE`."""
    return jnp.where(index_S[:, None] == NONE, 0, x_RD.at[index_S].get(mode="clip"))


@jax.custom_vjp
def take(x_RD: jax.Array, index_S: jax.Array, inverse_R: jax.Array) -> jax.Array:
    """`x_RD[index_S]`, zeros for `NONE`; no row is taken twice, and `inverse_R` says where each goes."""
    return _rows(x_RD, index_S)


take.defvjp(
    lambda x_RD, index_S, inverse_R: (_rows(x_RD, index_S), inverse_R),
    lambda inverse_R, dy_SD: (_rows(dy_SD, inverse_R), None, None),
)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def repeat(x_ND: jax.Array, choice_S: jax.Array, inverse_A: jax.Array, choices: int) -> jax.Array:
    """The tokens of these choices (`n * choices + k` is of token n), `[S, D]`; their gradients add up in float32."""
    return _rows(x_ND, choice_S // choices)


def _repeat_backward(choices, inverse_A, dy_SD):
    by_choice = _rows(dy_SD, inverse_A).reshape(-1, choices, dy_SD.shape[1])
    return jnp.sum(by_choice, axis=1, dtype=jnp.float32).astype(dy_SD.dtype), None, None


repeat.defvjp(
    lambda x_ND, choice_S, inverse_A, choices: (_rows(x_ND, choice_S // choices), inverse_A), _repeat_backward
)


# Parts of unequal size


class Way(NamedTuple):
    """What `jax.lax.ragged_all_to_all` is told: `[P * experts of a shard]`, a part for each expert of each shard."""

    input_offsets: jax.Array
    send_sizes: jax.Array
    output_offsets: jax.Array
    recv_sizes: jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ragged(axes: tuple[str, ...], rows: int, x_SD: jax.Array, there: Way, back: Way) -> jax.Array:
    """The rows that arrive, in a buffer of so many."""
    empty = jnp.zeros_like(x_SD, shape=(rows, x_SD.shape[1]))
    return jax.lax.ragged_all_to_all(x_SD, empty, *there, axis_name=axes)


_ragged.defvjp(
    lambda axes, rows, x_SD, there, back: (_ragged(axes, rows, x_SD, there, back), (len(x_SD), there, back)),
    lambda axes, rows, saved, dy_RD: (_ragged(axes, saved[0], dy_RD, saved[2], saved[1]), None, None),
)


# The way


class Dispatch(NamedTuple):
    """The way of the tokens of one layer.

    Attributes:
        sizes: rows of each of the device's own experts, int32.
        rows: `[N, D]` to the rows of the own experts, `[M, D]`, those of the first expert first.
        home: what the experts make of the rows to what each token gets for each choice, `[N, K, D]`.
    """

    sizes: jax.Array
    rows: Callable[[jax.Array], jax.Array]
    home: Callable[[jax.Array], jax.Array]


class Sorted(NamedTuple):
    """The choices of a device's tokens, by expert.

    Attributes:
        order: choices in the order of their experts, those without one last, `[A]`.
        place: where in `order` each choice is, `[A]`.
        counts: choices of each expert, `[E]`.
    """

    order: jax.Array
    place: jax.Array
    counts: jax.Array


def by_expert(expert_A: jax.Array, count: int) -> Sorted:
    """Choices sorted by expert, and in their own order among those of one; `count` stands for no expert."""
    order = jnp.argsort(expert_A, stable=True).astype(jnp.int32)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(len(order), dtype=jnp.int32), unique_indices=True)
    counts = jnp.sum(expert_A[:, None] == jnp.arange(count), axis=0, dtype=jnp.int32)
    return Sorted(order, place, counts)


def dispatch(homes: Homes, expert_NK: jax.Array) -> Dispatch:
    """The way of tokens whose choices are `expert_NK`, int32; `homes.count` stands for a choice that is dropped."""
    choices, expert_A = expert_NK.shape[1], expert_NK.reshape(-1)
    found = by_expert(expert_A, homes.count)
    if homes.shards == 1 or homes.ragged:
        real = jnp.arange(len(expert_A)) < jnp.sum(found.counts)
        sent_S, inverse_A = jnp.where(real, found.order, NONE), jnp.where(expert_A < homes.count, found.place, NONE)
    else:
        sent_S, inverse_A = _in_parts(homes, expert_A, found)

    def rows(x_ND: jax.Array) -> jax.Array:
        return repeat(x_ND, sent_S, inverse_A, choices)

    def home(y_SD: jax.Array) -> jax.Array:
        return take(y_SD, inverse_A, sent_S).reshape(*expert_NK.shape, y_SD.shape[1])

    if homes.shards == 1:
        return Dispatch(found.counts, rows, home)
    counts_PE = jax.lax.all_gather(found.counts, homes.axes)  # of the tokens of each device, for all experts
    me = jax.lax.axis_index(homes.axes)
    counts_PO = jax.lax.dynamic_slice_in_dim(counts_PE, me * homes.own, homes.own, axis=1)
    if homes.ragged:
        there, back = _ways(homes, counts_PE, me)
        arrives = homes.shards * homes.most
        return Dispatch(
            jnp.sum(counts_PO, axis=0),
            lambda x_ND: _ragged(homes.axes, arrives, rows(x_ND), there, back),
            lambda y_MD: home(_ragged(homes.axes, len(sent_S), y_MD, back, there)),
        )
    index_M, inverse_R = _merged(homes, counts_PO)
    exchange = partial(jax.lax.all_to_all, axis_name=homes.axes, split_axis=0, concat_axis=0, tiled=True)
    return Dispatch(
        jnp.sum(counts_PO, axis=0),
        lambda x_ND: take(exchange(rows(x_ND)), index_M, inverse_R),
        lambda y_MD: home(exchange(take(y_MD, inverse_R, index_M))),
    )


def _before(sizes: jax.Array, axis: int) -> jax.Array:
    """The sum of those before each along an axis."""
    return jnp.cumsum(sizes, axis=axis) - sizes


def _in_parts(homes: Homes, expert_A: jax.Array, found: Sorted) -> tuple[jax.Array, jax.Array]:
    """For a part of equal length for each shard: which choice each row is, `[P * most]`, and where each choice is."""
    sizes_P = jnp.sum(found.counts.reshape(homes.shards, homes.own), axis=1)
    starts_P, number = _before(sizes_P, 0), jnp.arange(homes.most)
    at = jnp.minimum(starts_P[:, None] + number, len(expert_A) - 1)
    sent_S = jnp.where(number < sizes_P[:, None], found.order[at], NONE).reshape(-1)
    shard_A = jnp.minimum(expert_A // homes.own, homes.shards - 1)
    place_A = shard_A * homes.most + found.place - starts_P[shard_A]
    return sent_S, jnp.where(expert_A < homes.count, place_A, NONE)


def _starts(counts_PO: jax.Array) -> jax.Array:
    """Where the rows of each device for each expert of one shard begin there: by expert, then by device, `[P, own]`."""
    return _before(jnp.sum(counts_PO, axis=0), 0) + _before(counts_PO, 0)


def _merged(homes: Homes, counts_PO: jax.Array) -> tuple[jax.Array, jax.Array]:
    """From rows as they arrive, in parts of equal length, to rows by expert; and back, `[P * most]` both."""
    ends_PO, number = jnp.cumsum(counts_PO, axis=1), jnp.arange(homes.most)
    expert_PR = jnp.sum(number[None, :, None] >= ends_PO[:, None, :], axis=-1)
    real_PR, expert_PR = expert_PR < homes.own, jnp.minimum(expert_PR, homes.own - 1)
    first_PO = _starts(counts_PO) - _before(counts_PO, 1)
    place_R = jnp.where(real_PR, jnp.take_along_axis(first_PO, expert_PR, axis=1) + number, NONE).reshape(-1)
    arrives = homes.shards * homes.most
    index_M = (
        jnp.full_like(place_R, NONE)
        .at[jnp.where(place_R == NONE, arrives, place_R)]
        .set(jnp.arange(arrives, dtype=place_R.dtype), mode="drop", unique_indices=False)
    )
    return index_M, place_R


def _ways(homes: Homes, counts_PE: jax.Array, me: jax.Array) -> tuple[Way, Way]:
    """The way to the experts and the way back: rows arrive sorted by expert, and return to where they came from."""
    by_shard_PPO = counts_PE.reshape(homes.shards, homes.shards, homes.own)  # device, shard, its expert
    starts_PPO = jax.vmap(_starts, in_axes=1, out_axes=1)(by_shard_PPO)
    sorted_PPO = _before(counts_PE, 1).reshape(by_shard_PPO.shape)  # where each device has its choices of an expert
    mine, here = (partial(jax.lax.dynamic_index_in_dim, index=me, axis=axis, keepdims=False) for axis in (0, 1))
    there = Way(mine(sorted_PPO), mine(by_shard_PPO), mine(starts_PPO), here(by_shard_PPO))
    back = Way(here(starts_PPO), here(by_shard_PPO), here(sorted_PPO), mine(by_shard_PPO))
    return Way(*(a.reshape(-1) for a in there)), Way(*(a.reshape(-1) for a in back))
