"""Muon's orthogonalization: replaces a momentum matrix by a nearby matrix with singular values near 1.

Newton-Schulz iteration after Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". It needs
whole matrices, but parameters are sharded over rows and columns. So the sharding moves to the stacked layers: each
device gets whole matrices of some layers (one all-to-all per mesh axis), orthogonalizes them, and sends the results
back. An unstacked matrix is all-gathered, and every device does the same work.

Every matrix is orthogonalized on one device, so results do not depend on the mesh.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from jaxinfra.optim.matrix_dims import MatrixDims
from jaxinfra.parallel.sharding import SpecEntry, axis_names
from jaxinfra.parallel.spec import PyTree

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic polynomial that is steepest at 0 and keeps singular values in about [0.7, 1.2].

Source: Jordan et al. 2024.
"""

# Keeps an all-zero matrix from dividing 0 by 0.
_TINY_NORM = 1e-12


def newton_schulz(x_BMN: jax.Array, *, iterations: int) -> jax.Array:
    """Moves the singular values of every matrix towards 1; B stands for any number of leading dimensions.

    One iteration is `X <- aX + (bA + cA^2)X` with `A = X X^T`: the odd polynomial `as + bs^3 + cs^5` of each singular
    value. Computes in the dtype of `x_BMN`; an all-zero matrix stays zero.
    """
    a, b, c = COEFFICIENTS
    is_wide = x_BMN.shape[-2] <= x_BMN.shape[-1]
    x = x_BMN if is_wide else x_BMN.mT  # A is then the smaller of the two Gram matrices
    norm = jnp.sqrt(jnp.square(x.astype(jnp.float32)).sum((-2, -1), keepdims=True))
    x = (x / (norm + _TINY_NORM)).astype(x_BMN.dtype)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x if is_wide else x.mT


def orthogonalize(
    dims_tree: PyTree, *, iterations: int, scale: Literal["rms", "width"], dtype: jnp.dtype
) -> optax.GradientTransformation:
    """Replaces updates by their orthogonalized matrices, scaled for their shape.

    Args:
        dims_tree: the `MatrixDims` of the updates, with the same masked nodes.
        iterations: Newton-Schulz iterations.
        scale: "rms" gives every update the usual root mean square of AdamW, about 0.2, so that both share one learning
            rate (Liu et al. 2025, section 2.2); "width" multiplies by `sqrt(max(1, cols / rows))` (Jordan et al. 2024).
        dtype: dtype of the matrix products and of the transfers between devices.
    """

    def orthogonalize_param(update: jax.Array, dims: MatrixDims) -> jax.Array:
        rows, cols = dims.matrix_shape(update.shape)
        factor = 0.2 * math.sqrt(max(rows, cols)) if scale == "rms" else math.sqrt(max(1.0, cols / rows))
        return factor * _orthogonalize(update.astype(dtype), dims, iterations).astype(update.dtype)

    return optax.stateless(lambda updates, params: jax.tree.map(orthogonalize_param, updates, dims_tree))


def _orthogonalize(x: jax.Array, dims: MatrixDims, iterations: int) -> jax.Array:
    """Applies `newton_schulz` to every matrix of a parameter; keeps the shape and sharding."""
    matrix_shape = dims.matrix_shape(x.shape)

    def solve(x: jax.Array) -> jax.Array:
        batch = x.shape[: -len(dims.matrix)]
        return newton_schulz(x.reshape(*batch, *matrix_shape), iterations=iterations).reshape(x.shape)

    return _map_whole_matrices(solve, x.transpose(dims.permutation), len(dims.batch)).transpose(
        dims.inverse_permutation
    )


def _map_whole_matrices(solve: Callable[[jax.Array], jax.Array], x: jax.Array, num_batch: int) -> jax.Array:
    """Applies `solve` with all dimensions after the first `num_batch` unsharded; the result is sharded like `x`."""
    sharding = jax.typeof(x).sharding
    sizes = dict(sharding.mesh.shape)
    batch, matrix = tuple(sharding.spec[:num_batch]), tuple(sharding.spec[num_batch:])
    # The last axis of a dimension moves first: each step is then an all-to-all inside small groups.
    axes = [axis for entry in matrix for axis in reversed(axis_names(entry))]
    if not axes:
        return solve(x)

    # Each batch dimension is split into (shards, layers per shard). The layers of a shard can then be padded and
    # sharded without moving a matrix to another existing shard.
    shards = [_num_shards(axis_names(entry), sizes) for entry in batch]
    layers = [length // count for length, count in zip(x.shape[:num_batch], shards, strict=True)]
    dim, layer_axes = assign_shards(layers, axes, sizes)
    specs = _reshard_steps(batch, matrix, axes, dim, layer_axes)

    split = x.reshape(*_interleave(shards, layers), *x.shape[num_batch:], out_sharding=specs[0])
    shape = split.shape
    if layer_axes:
        padding = [(0, 0)] * split.ndim
        padding[2 * dim + 1] = (0, -layers[dim] % _num_shards(layer_axes, sizes))
        split = jnp.pad(split, padding)
    for spec in specs[1:]:
        split = jax.reshard(split, spec)
    split = solve(split)
    for spec in reversed(specs[:-1]):
        split = jax.reshard(split, spec)
    split = split[tuple(slice(length) for length in shape)]
    return split.reshape(x.shape, out_sharding=sharding.spec)


def assign_shards(stack: Sequence[int], axes: Sequence[str], sizes: Mapping[str, int]) -> tuple[int, tuple[str, ...]]:
    """Chooses a stacked dimension, and a subset of `axes` to shard it over, so that devices have whole matrices.

    The choice has the fewest matrices per device, and then the fewest shards: 32 layers on axes of 64 and 8 use the
    axis of 64, and half of the devices have no matrix. With at most one layer, no axes are used.

    Args:
        stack: sizes of the stacked dimensions.
        axes: mesh axes that shard the matrices.
        sizes: size of every mesh axis.
    """
    best, best_cost = (0, ()), (math.prod(stack), 1)
    for dim, length in enumerate(stack):
        for count in range(1, len(axes) + 1):
            for subset in itertools.combinations(axes, count):
                shards = _num_shards(subset, sizes)
                cost = (math.prod(stack) // length * math.ceil(length / shards), shards)
                if cost < best_cost:
                    best, best_cost = (dim, subset), cost
    return best


def _reshard_steps(
    batch: Sequence[SpecEntry], matrix: Sequence[SpecEntry], axes: Sequence[str], dim: int, layer_axes: Sequence[str]
) -> list[PartitionSpec]:
    """Returns the sequence of shardings from sharded matrices to whole ones, one mesh axis per step.

    If two axes move at once, XLA's partitioner copies the whole array to every device.
    """
    matrix_axes = [axis_names(entry) for entry in matrix]
    moved: tuple[str, ...] = ()

    def spec() -> PartitionSpec:
        layers = [moved if at == dim else None for at in range(len(batch))]
        return PartitionSpec(*_interleave(batch, layers), *matrix_axes)

    steps = [spec()]
    # Axes that are only gathered come last, when a device has the least data.
    for axis in sorted(axes, key=lambda axis: axis not in layer_axes):
        matrix_axes = [tuple(name for name in names if name != axis) for names in matrix_axes]
        moved = (*moved, axis) if axis in layer_axes else moved
        steps.append(spec())
    return steps


def _num_shards(axes: Sequence[str], sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[axis] for axis in axes)


def _interleave[T](first: Sequence[T], second: Sequence[T]) -> list[T]:
    return [value for pair in zip(first, second, strict=True) for value in pair]
