"""Muon's orthogonalization: replaces a momentum matrix by a nearby matrix with singular values near 1.

Newton-Schulz iteration after Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". It needs
whole matrices, but parameters are sharded over rows and columns. So the sharding moves to the stacked layers: each
device gets whole matrices of some layers (one all-to-all per mesh axis), orthogonalizes them, and sends the results
back. An unstacked matrix is all-gathered, and every device does the same work.

Every matrix is orthogonalized on one device, so results do not depend on the mesh.

Shape suffixes: B any number of stacked dimensions, M rows, N columns.
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


def newton_schulz(x_BMN: jax.Array, *, iterations: int) -> jax.Array:
    """Moves the singular values of every matrix towards 1.

    One iteration is `X <- aX + (bA + cA^2)X` with `A = X X^T`: the odd polynomial `as + bs^3 + cs^5` of each singular
    value. Computes in the dtype of `x_BMN`; an all-zero matrix stays zero.
    """
    a, b, c = COEFFICIENTS
    is_wide = x_BMN.shape[-2] <= x_BMN.shape[-1]
    x = x_BMN if is_wide else x_BMN.mT  # A is then the smaller of the two Gram matrices
    norm = jnp.sqrt(jnp.square(x.astype(jnp.float32)).sum((-2, -1), keepdims=True))
    x = (x / (norm + 1e-12)).astype(x_BMN.dtype)  # zero stays zero, instead of 0 / 0
    for _ in range(iterations):
        gram = x @ x.mT  # A
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x if is_wide else x.mT


def orthogonalize(
    dims_tree: PyTree, *, iterations: int, scale: Literal["rms", "width"], dtype: jnp.dtype
) -> optax.GradientTransformation:
    """Replaces updates by their orthogonalized matrices, scaled for their shape.

    `dims_tree` has the `MatrixDims` of the updates; `optimizers.Muon` explains the other arguments.
    """

    def orthogonalize_param(update: jax.Array, dims: MatrixDims) -> jax.Array:
        rows, cols = dims.matrix_shape(update.shape)
        # "rms" gives every update AdamW's usual root mean square, about 0.2 (Liu et al. 2025, section 2.2).
        factor = 0.2 * math.sqrt(max(rows, cols)) if scale == "rms" else math.sqrt(max(1.0, cols / rows))
        return factor * _orthogonalize(update.astype(dtype), dims, iterations).astype(update.dtype)

    return optax.stateless(lambda updates, params: jax.tree.map(orthogonalize_param, updates, dims_tree))


def _orthogonalize(x: jax.Array, dims: MatrixDims, iterations: int) -> jax.Array:
    """Applies `newton_schulz` to every matrix of a parameter; keeps the shape and sharding."""
    matrix_shape = dims.matrix_shape(x.shape)

    def solve(x: jax.Array) -> jax.Array:
        batch = x.shape[: -len(dims.matrix)]
        return newton_schulz(x.reshape(*batch, *matrix_shape), iterations=iterations).reshape(x.shape)

    order = (*dims.batch, *dims.matrix)
    y = _map_whole_matrices(solve, x.transpose(order), len(dims.batch))
    return y.transpose([order.index(dim) for dim in range(x.ndim)])


def _map_whole_matrices(solve: Callable[[jax.Array], jax.Array], x: jax.Array, num_batch: int) -> jax.Array:
    """Applies `solve` with all dimensions after the first `num_batch` unsharded; the result is sharded like `x`.

    With mesh axes fsdp=4 and tensor=2, `f32[12, M@fsdp, N@tensor]` is padded to 16 layers, and `solve` gets two whole
    matrices on each device: first `f32[16@fsdp, M, N@tensor]` and then `f32[16@(fsdp, tensor), M, N]`.
    """
    sharding = jax.typeof(x).sharding
    sizes = dict(sharding.mesh.shape)
    matrix = tuple(sharding.spec[num_batch:])
    # The last axis of a dimension moves first: each step is then an all-to-all inside small groups.
    axes = [axis for entry in matrix for axis in reversed(axis_names(entry))]
    if not axes:
        return solve(x)

    # An unstacked matrix is treated as a stack of one layer.
    batch, batch_shape = tuple(sharding.spec[:num_batch]) or (None,), x.shape[:num_batch] or (1,)
    shards = [_num_shards(axis_names(entry), sizes) for entry in batch]
    local_shape = [length // count for length, count in zip(batch_shape, shards, strict=True)]
    dim, layer_axes = assign_shards(local_shape, axes, sizes)
    specs = _reshard_steps(batch, matrix, axes, dim, layer_axes)

    # The chosen dimension is split into (shards, layers per shard). So the layers of a shard can be padded and sharded
    # further, and no matrix leaves its shard.
    layers = local_shape[dim]
    split_shape = (*batch_shape[:dim], shards[dim], layers, *batch_shape[dim + 1 :], *x.shape[num_batch:])
    y = x.reshape(split_shape, out_sharding=specs[0])
    if layer_axes:
        padding = [(0, 0)] * y.ndim
        padding[dim + 1] = (0, -layers % _num_shards(layer_axes, sizes))
        y = jnp.pad(y, padding)
    for spec in specs[1:]:
        y = jax.reshard(y, spec)
    y = solve(y)
    for spec in reversed(specs[:-1]):
        y = jax.reshard(y, spec)
    return jax.lax.slice_in_dim(y, 0, layers, axis=dim + 1).reshape(x.shape, out_sharding=sharding.spec)


def assign_shards(stack: Sequence[int], axes: Sequence[str], sizes: Mapping[str, int]) -> tuple[int, tuple[str, ...]]:
    """Chooses a stacked dimension, and a subset of `axes` to shard it over, so that devices have whole matrices.

    The choice has the fewest matrices per device, and then the fewest shards: 32 layers on axes of 64 and 8 use the
    axis of 64, and half of the devices have no matrix. With one layer, no axes are used.

    `stack` has the sizes of the stacked dimensions, at least one; `axes` are the mesh axes that shard the matrices.
    """

    def cost(choice: tuple[int, tuple[str, ...]]) -> tuple[int, int]:
        dim, subset = choice
        shards = _num_shards(subset, sizes)
        matrices = math.prod(math.ceil(n / shards) if at == dim else n for at, n in enumerate(stack))
        return matrices, shards

    subsets = [subset for count in range(len(axes) + 1) for subset in itertools.combinations(axes, count)]
    return min(itertools.product(range(len(stack)), subsets), key=cost)


def _reshard_steps(
    batch: Sequence[SpecEntry], matrix: Sequence[SpecEntry], axes: Sequence[str], dim: int, layer_axes: tuple[str, ...]
) -> list[PartitionSpec]:
    """Returns the sequence of shardings from sharded matrices to whole ones, one mesh axis per step.

    `batch` and `matrix` are how the stacked dimensions and those of the matrices are sharded by `axes`, and `dim` is
    the stacked dimension that `layer_axes` will shard. If two axes move at once, XLA's partitioner copies the whole
    array to every device.
    """
    # Axes that are only gathered come last, when a device has the least data.
    order = [*layer_axes, *(axis for axis in axes if axis not in layer_axes)]
    steps = []
    for moved in range(len(order) + 1):
        matrix_axes = [tuple(axis for axis in axis_names(entry) if axis in order[moved:]) for entry in matrix]
        steps.append(PartitionSpec(*batch[: dim + 1], layer_axes[:moved], *batch[dim + 1 :], *matrix_axes))
    return steps


def _num_shards(axes: Sequence[str], sizes: Mapping[str, int]) -> int:
    """Returns the number of shards over mesh axes of these sizes."""
    return math.prod(sizes[axis] for axis in axes)
