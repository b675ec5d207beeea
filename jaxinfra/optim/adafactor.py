"""Adafactor: stores the second moment of a matrix as row means and column means.

After Shazeer & Stern 2018, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost". For an unstacked matrix it
computes what `optax.adafactor` computes; stacked layers are separate matrices (see `matrix_dims`).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxinfra.optim.matrix_dims import MatrixDims, matrix_dims
from jaxinfra.parallel.spec import ParamSpec, PyTree


class Factored(NamedTuple):
    """Means of a matrix's squared gradient: `row` has no column dimensions, `col` no row dimensions."""

    row: jax.Array
    col: jax.Array


class FactoredState(NamedTuple):
    """The number of updates so far, and the second moments: `Factored`, or unfactored arrays for small matrices."""

    step: jax.Array
    second: PyTree


def scale_by_factored_rms(
    specs: PyTree, *, decay_power: float, min_factored_dim: int, clip_rms: float | None
) -> optax.GradientTransformation:
    """Divides gradients by the root of their factored second moment (Algorithm 4).

    `specs` are the `ParamSpec`s; `optimizers.Adafactor` explains the other arguments.
    """
    factored = jax.tree.map(lambda spec: _is_factored(spec, min_factored_dim), specs)
    dims_tree = jax.tree.map(matrix_dims, specs)

    def init(params: optax.Params) -> FactoredState:
        def zeros(param: jax.Array, is_factored: bool, dims: MatrixDims) -> Factored | jax.Array:
            if not is_factored:
                return jnp.zeros_like(param)
            # The type of a mean carries the sharding of the remaining dimensions.
            row, col = jax.eval_shape(lambda p: (p.mean(dims.cols), p.mean(dims.rows)), param)
            return Factored(jnp.zeros_like(row), jnp.zeros_like(col))

        return FactoredState(jnp.zeros([], jnp.int32), jax.tree.map(zeros, params, factored, dims_tree))

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, FactoredState]:
        del params
        assert isinstance(state, FactoredState)
        step = state.step + 1
        decay = 1 - step.astype(jnp.float32) ** -decay_power
        second = jax.tree.map(lambda g, v, dims: _moment(g, v, dims, decay), updates, state.second, dims_tree)
        scaled = jax.tree.map(lambda g, v, dims: _scale(g, v, dims, clip_rms), updates, second, dims_tree)
        return scaled, FactoredState(step, second)

    return optax.GradientTransformation(init, update)


def scale_by_param_rms(specs: PyTree, *, min_rms: float) -> optax.GradientTransformation:
    """Multiplies updates by the root mean square of their matrix, at least `min_rms` (section 8)."""
    dims_tree = jax.tree.map(matrix_dims, specs)

    def scale(update: jax.Array, param: jax.Array, dims: MatrixDims) -> jax.Array:
        return update * jnp.maximum(_rms(param, dims), min_rms)

    return optax.stateless(lambda updates, params: jax.tree.map(scale, updates, params, dims_tree))


def _is_factored(spec: ParamSpec, min_factored_dim: int) -> bool:
    """Returns whether the second moment of a parameter is stored as `Factored`."""
    return spec.role not in ("norm", "bias") and min(matrix_dims(spec).matrix_shape(spec.shape)) >= min_factored_dim


def _moment(grad: jax.Array, old: Factored | jax.Array, dims: MatrixDims, decay: jax.Array) -> Factored | jax.Array:
    """Returns the second moment after one more gradient."""
    square = jnp.square(grad) + 1e-30  # the paper's epsilon_1 keeps the root finite for gradients that were always zero
    if isinstance(old, Factored):
        return Factored(
            decay * old.row + (1 - decay) * square.mean(dims.cols),
            decay * old.col + (1 - decay) * square.mean(dims.rows),
        )
    return decay * old + (1 - decay) * square


def _scale(grad: jax.Array, second: Factored | jax.Array, dims: MatrixDims, clip_rms: float | None) -> jax.Array:
    """Divides a gradient by the root of its second moment, and limits the root mean square of each matrix."""
    if isinstance(second, Factored):
        # Their outer product, divided by the mean of the rows, stands for the second moment of each element.
        row = jnp.expand_dims(second.row, dims.cols)
        col = jnp.expand_dims(second.col, dims.rows)
        update = grad * jax.lax.rsqrt(row / row.mean(dims.rows, keepdims=True)) * jax.lax.rsqrt(col)
    else:
        update = grad * jax.lax.rsqrt(second)
    if clip_rms is None:
        return update
    return update / jnp.maximum(_rms(update, dims) / clip_rms, 1.0)


def _rms(x: jax.Array, dims: MatrixDims) -> jax.Array:
    """Returns the root mean square of each matrix, its dimensions kept with size 1."""
    size = math.prod(x.shape[dim] for dim in dims.matrix)
    return jnp.sqrt(jnp.square(x).sum(dims.matrix, keepdims=True) / size)
