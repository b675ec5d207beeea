"""The product of rows that are sorted into groups with the matrix of each group: all experts of a layer at once.

How many rows a group has is known only when it runs. TPUs and GPUs have it as one operation, `jax.lax.ragged_dot`. What
JAX makes of that on CPUs multiplies every row with every matrix; there the rows pass in blocks of one group each, and a
loop takes as many steps as there are blocks: its work is that of the rows, whatever the number of groups.

Not for where rows come from (see `parallel.expert`). Rows beyond the last group become zeros.

Shape suffixes: M rows, E groups, K contracted, N yielded, R rows of a block.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

BLOCK = 128
"""Rows of a block at most: enough for the matrix units, and little to pad a small group with."""


def grouped_dot(x_MK: jax.Array, w_EKN: jax.Array, sizes_E: jax.Array, *, platform: str) -> jax.Array:
    """Each row times the matrix of its group, `[M, N]`; in a `shard_map` all three vary over the same mesh axes.

    Args:
        x_MK: rows, those of group 0 first.
        w_EKN: a matrix for each group, of the same dtype.
        sizes_E: rows of each group, int32; their sum is at most M.
        platform: "cpu", "gpu" or "tpu".
    """
    return (_in_blocks if platform == "cpu" else jax.lax.ragged_dot)(x_MK, w_EKN, sizes_E)


class Blocks(NamedTuple):
    """Consecutive rows of one group each, in order; `steps` of them, of `[E + M / R]` that there can be.

    Attributes:
        group: of each block.
        start: its first row.
        end: behind its last row.
        steps: how many there are, an int32 scalar.
    """

    group: jax.Array
    start: jax.Array
    end: jax.Array
    steps: jax.Array


def _blocks(sizes_E: jax.Array, rows: int, block: int) -> Blocks:
    ends_E, of_group_E = jnp.cumsum(sizes_E), -(-sizes_E // block)
    last_E = jnp.cumsum(of_group_E)
    number = jnp.arange(len(sizes_E) + -(-rows // block), dtype=sizes_E.dtype)
    group = jnp.minimum(jnp.searchsorted(last_E, number, side="right"), len(sizes_E) - 1)
    within = number - (last_E - of_group_E)[group]
    return Blocks(group, (ends_E - sizes_E)[group] + within * block, ends_E[group], last_E[-1])


def _padded(x_MK: jax.Array, block: int) -> jax.Array:
    """With rows enough that a block may begin at any."""
    return jnp.pad(x_MK, ((0, block), (0, 0)))


def _times(x_MK: jax.Array, w_EKN: jax.Array, sizes_E: jax.Array, contract: int) -> jax.Array:
    """Rows times matrices by their dimension `contract`: 1 for K, 2 for N."""
    rows, block = len(x_MK), min(BLOCK, len(x_MK))
    blocks, padded = _blocks(sizes_E, rows, block), _padded(x_MK, block)

    def body(number: jax.Array, y: jax.Array) -> jax.Array:
        w = jax.lax.dynamic_index_in_dim(w_EKN, blocks.group[number], keepdims=False)
        x = jax.lax.dynamic_slice_in_dim(padded, blocks.start[number], block)
        # A block goes on into the next group; what it writes there is written over by that group's own.
        found = jax.lax.dot_general(x, w, (((1,), (contract - 1,)), ((), ())))
        return jax.lax.dynamic_update_slice_in_dim(y, found, blocks.start[number], 0)

    empty = jnp.zeros_like(padded, shape=(rows + block, w_EKN.shape[3 - contract]))
    y = jax.lax.fori_loop(0, blocks.steps, body, empty)[:rows]
    return jnp.where(jnp.arange(rows)[:, None] < jnp.sum(sizes_E), y, 0)


def _gradient(x_MK: jax.Array, dy_MN: jax.Array, w_EKN: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Of each group the sum over its rows of the outer products of `x` and `dy`, summed in float32."""
    rows, block = len(x_MK), min(BLOCK, len(x_MK))
    blocks, xs, dys = _blocks(sizes_E, rows, block), _padded(x_MK, block), _padded(dy_MN, block)

    def body(number: jax.Array, total: jax.Array) -> jax.Array:
        start, group = blocks.start[number], blocks.group[number]
        x, dy = (jax.lax.dynamic_slice_in_dim(a, start, block) for a in (xs, dys))
        x = jnp.where(jnp.arange(block)[:, None] < blocks.end[number] - start, x, 0)
        found = jax.lax.dot_general(x, dy, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        before = jax.lax.dynamic_index_in_dim(total, group, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(total, before + found, group, 0)

    return jax.lax.fori_loop(0, blocks.steps, body, jnp.zeros_like(w_EKN, jnp.float32)).astype(w_EKN.dtype)


@jax.custom_vjp
def _in_blocks(x_MK: jax.Array, w_EKN: jax.Array, sizes_E: jax.Array) -> jax.Array:
    return _times(x_MK, w_EKN, sizes_E, contract=1)


def _forward(x_MK: jax.Array, w_EKN: jax.Array, sizes_E: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _times(x_MK, w_EKN, sizes_E, contract=1), (x_MK, w_EKN, sizes_E)


def _backward(saved: tuple[jax.Array, ...], dy_MN: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x_MK, w_EKN, sizes_E = saved
    return _times(dy_MN, w_EKN, sizes_E, contract=2), _gradient(x_MK, dy_MN, w_EKN, sizes_E), None


_in_blocks.defvjp(_forward, _backward)
