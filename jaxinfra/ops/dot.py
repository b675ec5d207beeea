"""The matmul of activations with a weight, in the layout that runs fast on each platform.

On CPUs and GPUs all operands are flattened to rank 2. XLA's CPU backend runs the weight gradient of a rank-3 matmul in
a slow loop (a step takes 2 to 6 times longer); on GPUs the reshapes are free. On TPUs heads are not flattened into
features: this would change the tiling and copy attention's queries and outputs. Weights of several pipeline stages have
a leading dimension, sharded over the mesh axis `stage`, which is a batch dimension of the matmul.

In JAX an *unreduced* array is a partial sum on each device; a *reduced* one is replicated, with *unreduced* gradients.

Shape suffixes: M rows, K contracted dimensions, N output dimensions. In examples: S pipeline stages, B batch, T length,
H heads, K head dim, D hidden size.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import jax
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec

from jaxinfra.ops import quantized
from jaxinfra.parallel.sharding import axis_names, has_stage_dim

if TYPE_CHECKING:
    from qwix import QArray


class DotSpec(NamedTuple):
    """The options of `dot`; `stage_dims` is 1 if both operands have a dimension of pipeline stages, else 0."""

    unreduced: frozenset[str]
    in_dims: int
    stage_dims: int


def dot(
    x: jax.Array,
    w: jax.Array,
    *,
    in_dims: int = 1,
    unreduced: frozenset[str] = frozenset(),
    flatten: bool = True,
    quantized_w: "QArray | None" = None,
) -> jax.Array:
    """Contracts the last dimensions of `x` with the first of `w`; returns `[..., *N]` in the dtype of `x`.

    Args:
        x: activations `[..., *K]`.
        w: a gathered weight `[*K, *N]` (see `Partitioner.gather_weight`), or `[S, *K, *N]` with pipeline stages, in
            the dtype of the result.
        in_dims: number of dimensions in K.
        unreduced: mesh axes that shard K; the result is a partial sum over them.
        flatten: whether to flatten the operands to rank 2.
        quantized_w: the weight in another number format, gathered (see `ops.quantized`). Then `x` is quantized as well,
            and `w` only takes the gradient: its value is not used.
    """
    stage_dims = 1 if has_stage_dim(jax.typeof(w).sharding.spec) else 0
    spec = DotSpec(unreduced, in_dims, stage_dims)
    out = _out_sharding(x, w, spec)
    lead, out_shape = x.shape[: x.ndim - in_dims], w.shape[stage_dims + in_dims :]  # "..." and N of the result
    assert x.shape[x.ndim - in_dims :] == w.shape[stage_dims : stage_dims + in_dims], (x.shape, w.shape)
    if stage_dims:
        x = _split_stages(x, len(w))
    if flatten:
        # With in_dims=2, [B, T, H, K] x [H, K, D] becomes [B * T, H * K] x [H * K, D].
        stage_groups = [1] * stage_dims
        lead_groups = [len(lead)] if _merge_is_free(x, stage_dims, stage_dims + len(lead)) else [1] * len(lead)
        x = _merge(x, [*stage_groups, *lead_groups, in_dims])
        w_groups = [*stage_groups, in_dims, len(out_shape)]
        w = _merge(w, w_groups)
        if quantized_w is not None:
            value, scale = (_merge(each, w_groups) for each in (quantized_w.qvalue, quantized_w.scale))
            quantized_w = replace(quantized_w, qvalue=value, scale=scale)
        y = _dot(x, w, quantized_w, spec._replace(in_dims=1))
    elif quantized_w is None:
        y = _dot_general(x, w, spec)  # JAX's own gradient is fast where operands are not flattened
    else:
        y = _dot(x, w, quantized_w, spec)
    return y.reshape(*lead, *out_shape, out_sharding=out) if flatten or stage_dims else y


def _split_stages(x: jax.Array, stages: int) -> jax.Array:
    """Reshapes `[S * B, ...]` to `[S, B, ...]`: the rows of each stage."""
    spec = jax.typeof(x).sharding.spec
    rows, *others = spec.partitions
    first, *within = axis_names(rows)
    assert first == "stage", spec
    out = spec.update(partitions=("stage", tuple(within) or None, *others))
    return x.reshape(stages, x.shape[0] // stages, *x.shape[1:], out_sharding=out)


def _merge(x: jax.Array, groups: Sequence[int]) -> jax.Array:
    """Merges groups of consecutive dimensions: `[2, 3, 4, 5]` to `[6, 20]` for groups of 2 and 2.

    Only the first dimension of a group may be sharded.
    """
    spec, shape, partitions, first = jax.typeof(x).sharding.spec, [], [], 0
    for size in groups:
        shape.append(math.prod(x.shape[first : first + size]))
        partitions.append(spec.partitions[first])
        first += size
    return x.reshape(shape, out_sharding=spec.update(partitions=partitions))


def _merge_is_free(x: jax.Array, first: int, last: int) -> bool:
    """Returns whether merging dimensions `first` to `last` moves no data: only `first` has more than one shard."""
    spec, mesh = jax.typeof(x).sharding.spec, jax.typeof(x).sharding.mesh
    return all(mesh.shape[axis] == 1 for part in spec.partitions[first + 1 : last] for axis in axis_names(part))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _dot(x: jax.Array, w: jax.Array, quantized_w: "QArray | None", spec: DotSpec) -> jax.Array:
    if quantized_w is None:
        return _dot_general(x, w, spec)
    return quantized.dot_general(x, quantized_w, _dimension_numbers(x, spec), _out_sharding(x, w, spec))


def _dot_general(x: jax.Array, w: jax.Array, spec: DotSpec) -> jax.Array:
    out = _out_sharding(x, w, spec) if spec.unreduced else None
    return lax.dot_general(x, w, _dimension_numbers(x, spec), out_sharding=out)


def _dimension_numbers(x: jax.Array, spec: DotSpec) -> lax.DotDimensionNumbers:
    """Returns the dimensions to contract, and the batch dimensions, as `lax.dot_general` wants them."""
    stages, w_in = range(spec.stage_dims), range(spec.stage_dims, spec.stage_dims + spec.in_dims)
    return (tuple(range(x.ndim - spec.in_dims, x.ndim)), tuple(w_in)), (tuple(stages), tuple(stages))


def _out_sharding(x: jax.Array, w: jax.Array, spec: DotSpec) -> PartitionSpec:
    x_spec, w_spec = (jax.typeof(a).sharding.spec.partitions for a in (x, w))
    lead, out_dims = x_spec[: x.ndim - spec.in_dims], w_spec[spec.stage_dims + spec.in_dims :]
    return PartitionSpec(*lead, *out_dims, unreduced=spec.unreduced)


type _Operands = tuple[jax.Array, jax.Array | None, "QArray | None"]
"""The activations that a backward pass reads, and the weight, plain or quantized."""


def _forward(x: jax.Array, w: jax.Array, quantized_w: "QArray | None", spec: DotSpec) -> tuple[jax.Array, _Operands]:
    return _dot(x, w, quantized_w, spec), (x, w if quantized_w is None else None, quantized_w)


def _backward(spec: DotSpec, operands: _Operands, g: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, w, quantized_w = operands
    if quantized_w is not None:
        dx = quantized.input_gradient(x, quantized_w, g, _dimension_numbers(x, spec))
        w = quantized.cast_values(quantized_w, x.dtype)  # for its type; its values are not used
    else:
        assert w is not None
        (dx,) = jax.vjp(lambda x: _dot_general(x, w, spec), x)[1](g)
    w_spec = jax.typeof(w).sharding.spec
    if x.ndim > 2 or w.ndim > 2:  # `_transpose` is for matrices
        (dw,) = jax.vjp(lambda w: _dot_general(x, w, spec), w)[1](g)
        return dx, dw, None
    out = w_spec.update(unreduced=w_spec.reduced, reduced=w_spec.unreduced)
    return dx, lax.dot_general(_transpose(x), g, (((1,), (0,)), ((), ())), out_sharding=out), None


_dot.defvjp(_forward, _backward)


def _transpose(x_MK: jax.Array) -> jax.Array:
    """Transposes a matrix; on CPUs also in memory.

    XLA's CPU backend has no bfloat16 kernel that contracts the rows of both operands, and casts them to float32. With
    one operand transposed in memory it uses a bfloat16 kernel, 2 to 4 times faster; float32 is a little faster too.
    """
    row_major = Layout(major_to_minor=(0, 1))
    return lax.platform_dependent(x_MK.T, cpu=lambda x: with_layout_constraint(x, row_major), default=lambda x: x)
