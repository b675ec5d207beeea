"""Grouped matmul for experts: rows are sorted by group, and each row is multiplied with the matrix of its group.

The sizes of the groups are known only at run time. TPUs and GPUs use `jax.lax.ragged_dot`. On CPUs JAX lowers it to a
matmul of every row with every matrix, so there a loop over blocks of rows replaces it. Each block is within one group,
so the work grows with the rows, not with the groups.

Shape suffixes: M rows, E groups, K contracted, N output, R rows of a block.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

BLOCK_ROWS = 128
"""Most rows of a block: enough for an efficient matmul, with little padding for a small group."""


def grouped_dot(x_MK: jax.Array, w_EKN: jax.Array, sizes_E: jax.Array, *, platform: str) -> jax.Array:
    """Multiplies each row with the matrix of its group: `[M, N]`; rows beyond the last group become zeros.

    In a `shard_map` all three arguments must vary over the same mesh axes.

    Args:
        x_MK: rows, sorted by group.
        w_EKN: a matrix for each group, of the same dtype.
        sizes_E: number of rows in each group, int32; the sum is at most M.
        platform: "cpu", "gpu" or "tpu".
    """
    multiply = _blocked_dot if platform == "cpu" else jax.lax.ragged_dot
    return multiply(x_MK, w_EKN, sizes_E)


class RowBlocks(NamedTuple):
    """Blocks of consecutive rows, each within one group.

    Groups of 3, 0 and 6 rows have three blocks of at most 4 rows: `group=[0, 2, 2]`, `start=[0, 3, 7]`,
    `end=[3, 9, 9]`. The arrays have room for the most blocks that are possible, `E + M / R`.

    Attributes:
        group: the group of each block.
        start: the first row of each block.
        end: one after the last row of the block's group.
        num_blocks: how many entries are used, an int32 scalar.
    """

    group: jax.Array
    start: jax.Array
    end: jax.Array
    num_blocks: jax.Array


def _split_blocks(sizes_E: jax.Array, rows: int, block_rows: int) -> RowBlocks:
    ends_E, blocks_E = jnp.cumsum(sizes_E), -(-sizes_E // block_rows)  # rounded up
    block_ends_E = jnp.cumsum(blocks_E)
    index = jnp.arange(len(sizes_E) + -(-rows // block_rows), dtype=sizes_E.dtype)
    group = jnp.minimum(jnp.searchsorted(block_ends_E, index, side="right"), len(sizes_E) - 1)
    index_in_group = index - (block_ends_E - blocks_E)[group]
    start = (ends_E - sizes_E)[group] + index_in_group * block_rows
    return RowBlocks(group, start, ends_E[group], block_ends_E[-1])


def _multiply(x_MK: jax.Array, w_EKN: jax.Array, sizes_E: jax.Array, in_dim: int) -> jax.Array:
    """Contracts rows with dimension `in_dim` of `w_EKN`: 1 for K, 2 for N, where `x_MK` is `[M, N]`."""
    rows, block_rows, out_dim = len(x_MK), min(BLOCK_ROWS, len(x_MK)), 3 - in_dim  # `out_dim` is the other of 1 and 2
    blocks = _split_blocks(sizes_E, rows, block_rows)
    padded = jnp.pad(x_MK, ((0, block_rows), (0, 0)))  # so that a block may begin at any row

    def body(i: jax.Array, y: jax.Array) -> jax.Array:
        w = jax.lax.dynamic_index_in_dim(w_EKN, blocks.group[i], keepdims=False)
        x = jax.lax.dynamic_slice_in_dim(padded, blocks.start[i], block_rows)
        product = jax.lax.dot_general(x, w, (((1,), (in_dim - 1,)), ((), ())))  # w has no dimension E
        # A block may extend into the next group, whose own blocks overwrite these rows later.
        return jax.lax.dynamic_update_slice_in_dim(y, product, blocks.start[i], 0)

    empty = jnp.zeros_like(padded, shape=(rows + block_rows, w_EKN.shape[out_dim]))
    y = jax.lax.fori_loop(0, blocks.num_blocks, body, empty)[:rows]
    return jnp.where(jnp.arange(rows)[:, None] < jnp.sum(sizes_E), y, 0)


def _weight_gradient(x_MK: jax.Array, dy_MN: jax.Array, w_EKN: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Sums the outer products of `x` and `dy` over the rows of each group, in float32."""
    rows, block_rows = len(x_MK), min(BLOCK_ROWS, len(x_MK))
    blocks = _split_blocks(sizes_E, rows, block_rows)
    padded_x, padded_dy = (jnp.pad(a, ((0, block_rows), (0, 0))) for a in (x_MK, dy_MN))

    def body(i: jax.Array, total: jax.Array) -> jax.Array:
        start, group = blocks.start[i], blocks.group[i]
        x, dy = (jax.lax.dynamic_slice_in_dim(a, start, block_rows) for a in (padded_x, padded_dy))
        # Rows of the next group count as zeros.
        x = jnp.where(jnp.arange(block_rows)[:, None] < blocks.end[i] - start, x, 0)
        product = jax.lax.dot_general(x, dy, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        before = jax.lax.dynamic_index_in_dim(total, group, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(total, before + product, group, 0)

    return jax.lax.fori_loop(0, blocks.num_blocks, body, jnp.zeros_like(w_EKN, jnp.float32)).astype(w_EKN.dtype)


@jax.custom_vjp
def _blocked_dot(x_MK: jax.Array, w_EKN: jax.Array, sizes_E: jax.Array) -> jax.Array:
    return _multiply(x_MK, w_EKN, sizes_E, in_dim=1)


def _forward(x_MK: jax.Array, w_EKN: jax.Array, sizes_E: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _multiply(x_MK, w_EKN, sizes_E, in_dim=1), (x_MK, w_EKN, sizes_E)


def _backward(saved: tuple[jax.Array, ...], dy_MN: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x_MK, w_EKN, sizes_E = saved
    return _multiply(dy_MN, w_EKN, sizes_E, in_dim=2), _weight_gradient(x_MK, dy_MN, w_EKN, sizes_E), None


_blocked_dot.defvjp(_forward, _backward)
