"""Muon's orthogonalisation: a momentum matrix replaced by the nearest matrix with singular values near 1.

Newton-Schulz iteration after Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".
It multiplies whole matrices, which parameters sharded over rows and columns do not have on one device. So the
stacked layers are spread instead: every device gets whole matrices of some layers (one all-to-all a mesh
axis), works alone, and the results go back the same way. Nothing moves over mesh axes that the parameter is
not sharded over. A matrix that is not stacked is gathered, and every device does the same work.

Invariant: the numbers do not depend on the mesh, since every matrix is orthogonalised on one device.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from jaxinfra.optim.matrix_dims import MatrixDims

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic: the steepest at 0 that keeps singular values in about [0.7, 1.2] (Jordan et al. 2024)."""

# Only keeps an all-zero matrix from dividing 0 by 0.
_TINY_NORM = 1e-12


def newton_schulz(x_BMN: jax.Array, *, iterations: int) -> jax.Array:
    """Every matrix of `x_BMN`, of any number of leading dimensions, with singular values pulled towards 1.

    One iteration is `X <- aX + (bA + cA^2)X` with `A = X X^T`: the odd polynomial `as + bs^3 + cs^5` of each
    singular value. Computes in the dtype of `x_BMN`; an all-zero matrix stays zero.
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
    blocks: Any, *, iterations: int, scale: Literal["rms", "width"], dtype: jnp.dtype
) -> optax.GradientTransformation:
    """Updates replaced by their orthogonalised matrices, scaled for their shape.

    Args:
        blocks: tree of `MatrixDims` like the updates, with the same masked nodes.
        iterations: of Newton-Schulz.
        scale: "rms" gives every update about AdamW's root mean square, 0.2, so that both share one learning
            rate (Liu et al. 2025, section 2.2); "width" multiplies by `sqrt(max(1, cols / rows))` (Jordan et
            al. 2024).
        dtype: of the matrix products and of what moves between devices.
    """

    def one(update: jax.Array, dims: MatrixDims) -> jax.Array:
        rows, cols = dims.matrix_shape(update.shape)
        factor = 0.2 * math.sqrt(max(rows, cols)) if scale == "rms" else math.sqrt(max(1.0, cols / rows))
        return factor * _orthogonal(update.astype(dtype), dims, iterations).astype(update.dtype)

    return optax.stateless(lambda updates, params: jax.tree.map(one, updates, blocks))


def _orthogonal(x: jax.Array, dims: MatrixDims, iterations: int) -> jax.Array:
    """`newton_schulz` of every matrix of one parameter, in the parameter's shape and sharding."""
    rows, cols = dims.matrix_shape(x.shape)

    def solve(whole: jax.Array) -> jax.Array:
        stack = whole.shape[: -len(dims.matrix)]
        return newton_schulz(whole.reshape(*stack, rows, cols), iterations=iterations).reshape(whole.shape)

    return _on_whole_matrices(solve, x.transpose(dims.permutation), len(dims.batch)).transpose(dims.inverse_permutation)


def _on_whole_matrices(solve: Callable[[jax.Array], jax.Array], x: jax.Array, stacked: int) -> jax.Array:
    """`solve(x)` with the dimensions after the first `stacked` unsharded; the result is sharded like `x`."""
    sharding = jax.typeof(x).sharding
    sizes = dict(sharding.mesh.shape)
    outer, inner = tuple(sharding.spec[:stacked]), tuple(sharding.spec[stacked:])
    # The last axis of a dimension first: each step is then an all-to-all inside small groups.
    moved = [axis for axes in inner for axis in reversed(_names(axes))]
    if not moved:
        return solve(x)

    # Each stacked dimension in two: what is sharded already, and what one shard of it holds. The second is
    # free to be padded and spread without a matrix leaving its shard of the first.
    shards = [_shards(_names(axes), sizes) for axes in outer]
    local = [length // count for length, count in zip(x.shape[:stacked], shards, strict=True)]
    dim, over = assign_shards(local, moved, sizes)
    route = _route(outer, inner, moved, dim, over)

    parts = x.reshape(*_alternate(shards, local), *x.shape[stacked:], out_sharding=route[0])
    shape = parts.shape
    if over:
        widths = [(0, 0)] * parts.ndim
        widths[2 * dim + 1] = (0, -local[dim] % _shards(over, sizes))
        parts = jnp.pad(parts, widths)
    for spec in route[1:]:
        parts = jax.reshard(parts, spec)
    parts = solve(parts)
    for spec in reversed(route[:-1]):
        parts = jax.reshard(parts, spec)
    parts = parts[tuple(slice(length) for length in shape)]
    return parts.reshape(x.shape, out_sharding=sharding.spec)


def assign_shards(stack: Sequence[int], axes: Sequence[str], sizes: Mapping[str, int]) -> tuple[int, tuple[str, ...]]:
    """The stacked dimension, and the mesh axes to spread it over, so that matrices are whole on each device.

    Of all subsets of `axes`, on any one dimension, the one is taken that leaves the fewest matrices on a
    device, and of these the smallest: 32 layers on axes of 64 and 8 go over the 64, one layer each and half
    of the devices none. With nothing stacked, or one matrix, every device gets it. The axes, of these `sizes`, are
    those that shard the matrices until now; `stack` has the sizes of the stacked dimensions.
    """
    best, cost = (0, ()), (math.prod(stack), 1)
    for dim, length in enumerate(stack):
        for count in range(1, len(axes) + 1):
            for subset in itertools.combinations(axes, count):
                shards = _shards(subset, sizes)
                held = math.prod(stack) // length * math.ceil(length / shards)
                if (held, shards) < cost:
                    best, cost = (dim, subset), (held, shards)
    return best


type Axes = str | tuple[str, ...] | None


def _route(
    outer: Sequence[Axes], inner: Sequence[Axes], moved: Sequence[str], dim: int, over: Sequence[str]
) -> list[PartitionSpec]:
    """The shardings on the way from sharded matrices to spread ones, one mesh axis a step.

    Where two axes move at once, XLA's partitioner copies the whole array to every device instead.
    """
    matrix = [_names(axes) for axes in inner]
    stacked: tuple[str, ...] = ()

    def spec() -> PartitionSpec:
        free = [stacked if at == dim else None for at in range(len(outer))]
        return PartitionSpec(*_alternate(outer, free), *matrix)

    route = [spec()]
    # What only has to be gathered comes last, when there is least of it to move.
    for axis in sorted(moved, key=lambda axis: axis not in over):
        matrix = [tuple(name for name in names if name != axis) for names in matrix]
        stacked = (*stacked, axis) if axis in over else stacked
        route.append(spec())
    return route


def _names(axes: Axes) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def _shards(axes: Sequence[str], sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[axis] for axis in axes)


def _alternate[T](first: Sequence[T], second: Sequence[T]) -> list[T]:
    return [value for pair in zip(first, second, strict=True) for value in pair]
