"""The matrix product of activations with a weight, in the layout that every platform runs fast.

On CPUs and GPUs the product is of rank 2: leading dimensions of the activations become rows, the contracted dimensions
one. XLA's CPU back end runs the weight gradient of a rank-3 product in a slow loop (2 to 6 times slower a step); on GPU
the reshapes are free. On TPU they are not where there are heads: an array of heads as one row of features is another
order of its tiles, so queries and outputs of attention were copied before and after; there dimensions stay apart.
Weights of several pipeline stages (a leading dimension over the mesh axis `stage`) make one such product for each
stage, with the rows of that stage.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec

from jaxinfra.ops import quantized
from jaxinfra.parallel.rules import Quantize
from jaxinfra.parallel.sharding import axis_names, has_stage_dim


def dot(
    x: jax.Array,
    w: jax.Array,
    *,
    contract: int = 1,
    partial: frozenset[str] = frozenset(),
    flat: bool = True,
    quantize: Quantize = "none",
) -> jax.Array:
    """Contracts the last dimensions of `x` with the first of `w`: `[..., *N]` in the dtype of `x`.

    Args:
        x: activations `[..., *K]`.
        w: a weight `[*K, *N]`, or of several stages `[S, *K, *N]`, ready for use (see `Layout.weight`), of the dtype
            of the product.
        contract: number of dimensions in `K`.
        partial: the mesh axes that `K` is sharded over, if the result is to stay a partial sum over them.
        flat: as one product of rank 2; False leaves all dimensions apart.
        quantize: the format of the factors (see `ops.quantized`).
    """
    x_spec, w_spec = (jax.typeof(a).sharding.spec for a in (x, w))
    stages = w.shape[:1] if has_stage_dim(w_spec) else ()
    first = len(stages)
    lead, n = x.shape[: x.ndim - contract], w.shape[first + contract :]
    assert x.shape[x.ndim - contract :] == w.shape[first : first + contract], (x.shape, w.shape)
    if stages:
        x = _split_stages(x, *stages)
    if flat:
        dims = first + len(lead)
        rows = 1 if _rows_are_contiguous(x, first, dims) else len(lead)
        x = _merge(x, (*(1,) * first, len(lead) + 1 - rows, *(1,) * (rows - 1), contract))
        y = _product(x, _merge(w, (*(1,) * first, contract, len(n))), _How(partial, 1, first, quantize))
    elif quantize == "none":
        y = _plain(x, w, partial, contract, first)
    else:
        y = _product(x, w, _How(partial, contract, first, quantize))
    if not (flat or stages):
        return y
    out = PartitionSpec(*x_spec.partitions[: len(lead)], *w_spec.partitions[first + contract :], unreduced=partial)
    return y.reshape(*lead, *n, out_sharding=out)


def _split_stages(x: jax.Array, stages: int) -> jax.Array:
    """`[S * B, ...]` to `[S, B, ...]`: the rows of each stage apart."""
    spec = jax.typeof(x).sharding.spec
    rows, *others = spec.partitions
    first, *within = axis_names(rows)
    assert first == "stage", spec
    out = spec.update(partitions=("stage", tuple(within) or None, *others))
    return x.reshape(stages, x.shape[0] // stages, *x.shape[1:], out_sharding=out)


def _merge(x: jax.Array, groups: Sequence[int]) -> jax.Array:
    """Dimensions merged in groups of these sizes; only the first of a group may be sharded."""
    spec, shape, parts, at = jax.typeof(x).sharding.spec, [], [], 0
    for size in groups:
        shape.append(math.prod(x.shape[at : at + size]))
        parts.append(spec.partitions[at])
        at += size
    return x.reshape(shape, out_sharding=spec.update(partitions=parts))


def _rows_are_contiguous(x: jax.Array, first: int, last: int) -> bool:
    """Whether merging these dimensions moves no data: only the first may really be sharded."""
    spec, mesh = jax.typeof(x).sharding.spec, jax.typeof(x).sharding.mesh
    return all(mesh.shape[axis] == 1 for part in spec.partitions[first + 1 : last] for axis in axis_names(part))


class _How(NamedTuple):
    partial: frozenset[str]
    contract: int
    stages: int
    quantize: Quantize


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: jax.Array, w: jax.Array, how: _How) -> jax.Array:
    """The contraction of `[*S, ..., *K]` and `[*S, *K, *N]`, sharded like the rows and the columns."""
    if how.quantize == "none":
        return _plain(x, w, how.partial, how.contract, how.stages)
    return quantized.product(x, w, *how)


def _plain(x: jax.Array, w: jax.Array, partial: frozenset[str], contract: int = 1, stages: int = 0) -> jax.Array:
    """The contraction as it stands, of `[*S, ..., *K]` and `[*S, *K, *N]`."""
    x_spec, w_spec = (jax.typeof(a).sharding.spec for a in (x, w))
    first = x.ndim - contract
    columns = w_spec.partitions[stages + contract :]
    out = PartitionSpec(*x_spec.partitions[:first], *columns, unreduced=partial) if partial else None
    contracted = (tuple(range(first, x.ndim)), tuple(range(stages, stages + contract)))
    side_by_side = tuple(range(stages))
    return jax.lax.dot_general(x, w, (contracted, (side_by_side, side_by_side)), out_sharding=out)


def _forward(x: jax.Array, w: jax.Array, how: _How) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(x, w, how), (x, w)


def _backward(how: _How, operands: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = operands
    plain = functools.partial(_plain, partial=how.partial, contract=how.contract, stages=how.stages)
    if how.quantize == "none":
        (dx,) = jax.vjp(lambda x: plain(x, w), x)[1](g)
    else:
        dx = quantized.input_gradient(x, w, g, how.contract, how.stages, how.quantize)
    if x.ndim > 2 or w.ndim > 2:
        (dw,) = jax.vjp(lambda w: plain(x, w), w)[1](g)
        return dx, dw
    w_spec = jax.typeof(w).sharding.spec
    out = w_spec.update(unreduced=w_spec.reduced, reduced=w_spec.unreduced)
    return dx, jax.lax.dot_general(_columns(x), g, (((1,), (0,)), ((), ())), out_sharding=out)


_product.defvjp(_forward, _backward)


def _columns(x_MK: jax.Array) -> jax.Array:
    """`x_MK` transposed; on CPUs also in memory.

    XLA's CPU back end has no bfloat16 kernel for a product over the rows of both factors: it casts both to
    float32. After a copy that turns one of them round it has, 2 to 4 times faster; float32 gains a little too.
    """
    row_major = Layout(major_to_minor=(0, 1))
    return jax.lax.platform_dependent(x_MK.T, cpu=lambda x: with_layout_constraint(x, row_major), default=lambda x: x)
