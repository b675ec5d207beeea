"""The matmul of activations with a weight, in the layout that runs fast on each platform.

On CPUs and GPUs all operands are flattened to rank 2. XLA's CPU backend runs the weight gradient of a rank-3 matmul in
a slow loop (a step takes 2 to 6 times longer); on GPUs the reshapes are free. On TPUs heads are not flattened into
features: this would change the tiling and copy attention's queries and outputs. Weights of several pipeline stages have
a leading dimension, sharded over the mesh axis `stage`, which is a batch dimension of the matmul.

In JAX's explicit sharding, *unreduced* means that each device holds a partial sum; *reduced* means replicated, with an
*unreduced* gradient.
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


class DotSpec(NamedTuple):
    """The dimensions and number format of a matmul of `[*S, ..., *K]` and `[*S, *K, *N]`.

    Attributes:
        unreduced: mesh axes that shard K; the result is a partial sum over them.
        in_dims: number of dimensions in K.
        stage_dims: number of dimensions in S, 0 or 1.
        quantize: number format of the operands.
    """

    unreduced: frozenset[str]
    in_dims: int
    stage_dims: int
    quantize: Quantize


def dot(
    x: jax.Array,
    w: jax.Array,
    *,
    in_dims: int = 1,
    unreduced: frozenset[str] = frozenset(),
    flatten: bool = True,
    quantize: Quantize = "none",
) -> jax.Array:
    """Contracts the last dimensions of `x` with the first of `w`: `[..., *N]` in the dtype of `x`.

    Args:
        x: activations `[..., *K]`.
        w: a gathered weight `[*K, *N]` (see `Partitioner.gather_weight`), or `[S, *K, *N]` with pipeline stages, in
            the dtype of the result.
        in_dims: number of dimensions in K.
        unreduced: mesh axes that shard K; the result is a partial sum over them.
        flatten: whether to flatten the operands to rank 2.
        quantize: number format of the operands (see `ops.quantized`).
    """
    x_spec, w_spec = (jax.typeof(a).sharding.spec for a in (x, w))
    stages = w.shape[:1] if has_stage_dim(w_spec) else ()
    stage_dims = len(stages)
    lead, out_shape = x.shape[: x.ndim - in_dims], w.shape[stage_dims + in_dims :]
    assert x.shape[x.ndim - in_dims :] == w.shape[stage_dims : stage_dims + in_dims], (x.shape, w.shape)
    if stages:
        x = _split_stages(x, *stages)
    if flatten:
        free = _merge_is_free(x, stage_dims, stage_dims + len(lead))
        lead_groups = [len(lead)] if free else [1] * len(lead)
        x = _merge(x, [*[1] * stage_dims, *lead_groups, in_dims])
        w = _merge(w, [*[1] * stage_dims, in_dims, len(out_shape)])
        y = _dot(x, w, DotSpec(unreduced, 1, stage_dims, quantize))
    elif quantize == "none":
        y = _dot_general(x, w, unreduced, in_dims, stage_dims)
    else:
        y = _dot(x, w, DotSpec(unreduced, in_dims, stage_dims, quantize))
    if not (flatten or stages):
        return y
    out_dims = w_spec.partitions[stage_dims + in_dims :]
    out = PartitionSpec(*x_spec.partitions[: len(lead)], *out_dims, unreduced=unreduced)
    return y.reshape(*lead, *out_shape, out_sharding=out)


def _split_stages(x: jax.Array, stages: int) -> jax.Array:
    """Reshapes `[S * B, ...]` to `[S, B, ...]`: the rows of each stage."""
    spec = jax.typeof(x).sharding.spec
    rows, *others = spec.partitions
    first, *within = axis_names(rows)
    assert first == "stage", spec
    out = spec.update(partitions=("stage", tuple(within) or None, *others))
    return x.reshape(stages, x.shape[0] // stages, *x.shape[1:], out_sharding=out)


def _merge(x: jax.Array, groups: Sequence[int]) -> jax.Array:
    """Merges consecutive dimensions in groups of these sizes; only the first of a group may be sharded."""
    spec, shape, parts, at = jax.typeof(x).sharding.spec, [], [], 0
    for size in groups:
        shape.append(math.prod(x.shape[at : at + size]))
        parts.append(spec.partitions[at])
        at += size
    return x.reshape(shape, out_sharding=spec.update(partitions=parts))


def _merge_is_free(x: jax.Array, first: int, last: int) -> bool:
    """Returns whether merging dimensions `first` to `last` moves no data: only `first` has more than one shard."""
    spec, mesh = jax.typeof(x).sharding.spec, jax.typeof(x).sharding.mesh
    return all(mesh.shape[axis] == 1 for part in spec.partitions[first + 1 : last] for axis in axis_names(part))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dot(x: jax.Array, w: jax.Array, spec: DotSpec) -> jax.Array:
    if spec.quantize == "none":
        return _dot_general(x, w, spec.unreduced, spec.in_dims, spec.stage_dims)
    return quantized.dot(x, w, *spec)


def _dot_general(
    x: jax.Array, w: jax.Array, unreduced: frozenset[str], in_dims: int = 1, stage_dims: int = 0
) -> jax.Array:
    x_spec, w_spec = (jax.typeof(a).sharding.spec for a in (x, w))
    first = x.ndim - in_dims
    out_dims = w_spec.partitions[stage_dims + in_dims :]
    out = PartitionSpec(*x_spec.partitions[:first], *out_dims, unreduced=unreduced) if unreduced else None
    contracted = (tuple(range(first, x.ndim)), tuple(range(stage_dims, stage_dims + in_dims)))
    batch = tuple(range(stage_dims))
    return jax.lax.dot_general(x, w, (contracted, (batch, batch)), out_sharding=out)


def _forward(x: jax.Array, w: jax.Array, spec: DotSpec) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _dot(x, w, spec), (x, w)


def _backward(spec: DotSpec, operands: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = operands
    plain = functools.partial(_dot_general, unreduced=spec.unreduced, in_dims=spec.in_dims, stage_dims=spec.stage_dims)
    if spec.quantize == "none":
        (dx,) = jax.vjp(lambda x: plain(x, w), x)[1](g)
    else:
        dx = quantized.input_gradient(x, w, g, spec.in_dims, spec.stage_dims, spec.quantize)
    if x.ndim > 2 or w.ndim > 2:
        (dw,) = jax.vjp(lambda w: plain(x, w), w)[1](g)
        return dx, dw
    w_spec = jax.typeof(w).sharding.spec
    out = w_spec.update(unreduced=w_spec.reduced, reduced=w_spec.unreduced)
    return dx, jax.lax.dot_general(_transpose(x), g, (((1,), (0,)), ((), ())), out_sharding=out)


_dot.defvjp(_forward, _backward)


def _transpose(x_MK: jax.Array) -> jax.Array:
    """Transposes a matrix; on CPUs also in memory.

    XLA's CPU backend has no bfloat16 kernel that contracts the rows of both operands, and casts them to float32. With
    one operand transposed in memory it uses a bfloat16 kernel, 2 to 4 times faster; float32 is a little faster too.
    """
    row_major = Layout(major_to_minor=(0, 1))
    return jax.lax.platform_dependent(x_MK.T, cpu=lambda x: with_layout_constraint(x, row_major), default=lambda x: x)
