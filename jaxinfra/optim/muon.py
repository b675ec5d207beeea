"""Muon's orthogonalisation: a momentum matrix replaced by the nearest matrix with singular values near 1.

Newton-Schulz iteration after Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". It
multiplies whole matrices, which parameters sharded over rows and columns do not have on one device. So the
stacked layers are spread instead: every device gets whole matrices of some layers (one all-to-all), works alone,
and the results go back (another). Nothing moves over mesh axes that the parameter is not sharded over.

Invariant: the numbers do not depend on the mesh, since every matrix is orthogonalised on one device.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from jaxinfra.optim.blocks import Block

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic: the steepest at 0 that keeps singular values in about [0.7, 1.2] (Jordan et al. 2024)."""

# Only keeps an all-zero matrix from dividing 0 by 0.
_TINY_NORM = 1e-12


def newton_schulz(x_BMN: jax.Array, *, iterations: int) -> jax.Array:
    """Every matrix of `x_BMN`, of any number of leading dimensions, with singular values pulled towards 1.

    One iteration is `X <- aX + (bA + cA^2)X` with `A = X X^T`: the odd polynomial `as + bs^3 + cs^5` of each singular
    value. Computes in the dtype of `x_BMN`; an all-zero matrix stays zero.
    """
    a, b, c = COEFFICIENTS
    wide = x_BMN.shape[-2] <= x_BMN.shape[-1]
    x = x_BMN if wide else x_BMN.mT  # A is then the smaller of the two Gram matrices
    norm = jnp.sqrt(jnp.square(x.astype(jnp.float32)).sum((-2, -1), keepdims=True))
    x = (x / (norm + _TINY_NORM)).astype(x_BMN.dtype)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x if wide else x.mT


def orthogonalize(
    blocks: Any,
    *,
    iterations: int,
    scale: Literal["rms", "width"],
    dtype: jnp.dtype,
) -> optax.GradientTransformation:
    """Updates replaced by their orthogonalised matrices, scaled for their shape.

    Args:
        blocks: tree of `Block` like the updates, or a function from the updates to it.
        iterations: of Newton-Schulz.
        scale: "rms" gives every update about AdamW's root mean square, 0.2, so that both share one learning rate
            (Liu et al. 2025, section 2.2); "width" multiplies by `sqrt(max(1, cols / rows))` (Jordan et al. 2024).
        dtype: of the matrix products and of what moves between devices.
    """

    def one(update: jax.Array, dims: Block) -> jax.Array:
        rows, cols = dims.matrix_shape(update.shape)
        factor = 0.2 * math.sqrt(max(rows, cols)) if scale == "rms" else math.sqrt(max(1.0, cols / rows))
        return factor * _orthogonal(update.astype(dtype), dims, iterations).astype(update.dtype)

    def update(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        del params
        return jax.tree.map(one, updates, blocks(updates) if callable(blocks) else blocks)

    return optax.stateless(update)


def _orthogonal(x: jax.Array, dims: Block, iterations: int) -> jax.Array:
    """`newton_schulz` of every matrix of one parameter, in the parameter's shape and sharding."""
    x = x.transpose(dims.order)
    sharding = jax.typeof(x).sharding
    layers = len(dims.batch)
    stored = tuple(sharding.spec)
    gathered, dim, padded = spread(x.shape[:layers], stored, dict(sharding.mesh.shape))
    length = x.shape[dim] if layers else 0
    if gathered != stored:
        if padded > length:
            x = jnp.pad(x, [(0, padded - length if at == dim else 0) for at in range(x.ndim)])
        x = jax.reshard(x, PartitionSpec(*gathered))
    flat = x.reshape(*x.shape[:layers], *_matrix(x.shape[layers:], len(dims.rows)))
    x = newton_schulz(flat, iterations=iterations).reshape(x.shape)
    if gathered != stored:
        x = jax.reshard(x, PartitionSpec(*stored))
        if padded > length:
            x = jax.lax.slice_in_dim(x, 0, length, axis=dim)
    return x.transpose(dims.inverse)


def _matrix(shape: Sequence[int], rows: int) -> tuple[int, int]:
    return math.prod(shape[:rows]), math.prod(shape[rows:])


type Axes = str | tuple[str, ...] | None


def spread(batch: Sequence[int], stored: Sequence[Axes], sizes: dict[str, int]) -> tuple[tuple[Axes, ...], int, int]:
    """How matrices sharded like `stored` are laid out whole, each on as few devices as the stack allows.

    The axes that shard a matrix move to the stacked dimension with the most matrices on a device. Of all subsets of
    them the one is taken that leaves the fewest matrices a device, and of these the smallest: with 32 layers and
    axes of 64 and 8, each of 32 devices' groups gets one layer, and 32 stand idle. With nothing stacked every
    device gets the whole matrix.

    Args:
        batch: sizes of the stacked dimensions, which come first.
        stored: mesh axes of every dimension, the stacked ones first.
        sizes: of the mesh axes.

    Returns:
        Mesh axes of every dimension; the stacked dimension that they moved to; the length that it must be padded to.
    """
    parts = [() if part is None else (part,) if isinstance(part, str) else tuple(part) for part in stored]
    moved = [axis for part in parts[len(batch) :] for axis in part]
    if not moved:
        return tuple(stored), 0, batch[0] if batch else 0
    whole: list[Axes] = [None] * len(parts)
    if not batch:
        return tuple(whole), 0, 0

    def shards(axes: Sequence[str]) -> int:
        return math.prod(sizes[axis] for axis in axes)

    local = [length // shards(part) for length, part in zip(batch, parts, strict=False)]
    dim = local.index(max(local))
    # Only an unsharded dimension can be padded without moving what it holds.
    subsets = [
        axes
        for count in range(len(moved) + 1)
        for axes in itertools.combinations(moved, count)
        if not parts[dim] or local[dim] % shards(axes) == 0
    ]
    best = min(subsets, key=lambda axes: (math.ceil(local[dim] / shards(axes)), shards(axes)))
    whole[: len(batch)] = [part or None for part in parts[: len(batch)]]
    whole[dim] = (*parts[dim], *best) or None
    each = math.ceil(local[dim] / shards(best))
    return tuple(whole), dim, each * shards(best) * shards(parts[dim])
