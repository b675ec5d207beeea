"""Matmuls of activations with weights in int8 or float8, for training.

qwix quantizes both operands dynamically. Every row of the activations and every column of the weight has a scale,
`max|.| / largest number of the format`, over the whole contracted dimension. The maximum is taken over all shards, so
results do not depend on the mesh. No state is kept between steps.

Two of the three matmuls of a training step are quantized: the forward pass and the gradient of the activations. The
gradient of the weight is not: it contracts rows, so its scales would depend on the whole batch. It uses the
unquantized activations.

In JAX's explicit sharding, *unreduced* means that each device holds a partial sum; *reduced* means replicated, with an
*unreduced* gradient.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxinfra.parallel.rules import Quantize

if TYPE_CHECKING:
    from qwix import QArray

FORMATS: dict[Quantize, tuple[jnp.dtype, str]] = {
    "int8": (jnp.dtype(jnp.int8), f"absmax,{127.5 / 127}"),
    "fp8": (jnp.dtype(jnp.float8_e4m3fn), "absmax"),
}
"""The dtype of both operands, and the calibration method of qwix.

With one scale per row, float8 needs precision more than range, for gradients too: E4M3 everywhere (DeepSeek-V3, section
3.3). By default qwix maps the maximum to 127.5 in int8, where the last bit of a scale decides between two integers.
Here it is 127.
"""


def dot(
    x: jax.Array, w: jax.Array, unreduced: frozenset[str], in_dims: int, stage_dims: int, quantize: Quantize
) -> jax.Array:
    """Contracts quantized `x` `[*S, ..., *K]` and `w` `[*S, *K, *N]`, summed in int32 or float32.

    The last four arguments are fields of `ops.dot.DotSpec`. Returns `[*S, ..., *N]` in the dtype of `x`.
    """
    import qwix

    x_spec, w_spec = (jax.typeof(a).sharding.spec for a in (x, w))
    x_in, w_in = (tuple(range(first, first + in_dims)) for first in (x.ndim - in_dims, stage_dims))
    out_dims = w_spec.partitions[stage_dims + in_dims :]
    out = PartitionSpec(*x_spec.partitions[: x.ndim - in_dims], *out_dims, unreduced=unreduced)
    y = qwix.dot_general(
        _with_reduced_scales(_quantize(x, x_in, quantize), unreduced),
        _with_reduced_scales(_quantize(w, w_in, quantize), unreduced),
        ((x_in, w_in), (range(stage_dims), range(stage_dims))),
        preferred_element_type=jnp.float32,
        out_sharding=out,
    )
    return y.astype(x.dtype)


def input_gradient(
    x: jax.Array, w: jax.Array, g: jax.Array, in_dims: int, stage_dims: int, quantize: Quantize
) -> jax.Array:
    """Computes the gradient of `x` in `dot` with quantized operands; `g` is the gradient of the result.

    This matmul contracts the columns of the weight. Their scales are multiplied into `g` before it is quantized (as in
    AQT and qwix), so the quantized weight is exactly the one of the forward pass.
    """
    import qwix

    spec = jax.typeof(x).sharding.spec
    out = spec.update(reduced=spec.unreduced, unreduced=spec.reduced)
    in_w = tuple(range(stage_dims, stage_dims + in_dims))
    out_w = tuple(range(stage_dims + in_dims, w.ndim))
    out_g = tuple(range(g.ndim - len(out_w), g.ndim))
    weight = _quantize(w, in_w, quantize)
    column_scales = jnp.expand_dims(weight.scale.squeeze(in_w), tuple(range(stage_dims, out_g[0])))
    scaled_g = _quantize(_without_reduced(g).astype(jnp.float32) * column_scales, out_g, quantize)
    dx = qwix.dot_general(
        _with_reduced_scales(scaled_g, out.unreduced),
        weight.qvalue,
        ((out_g, out_w), (range(stage_dims), range(stage_dims))),
        preferred_element_type=jnp.float32,
        out_sharding=out,
    )
    return dx.astype(x.dtype)


def _quantize(a: jax.Array, contracted: tuple[int, ...], quantize: Quantize) -> "QArray":
    """Quantizes an array; elements along the contracted dimensions share a scale."""
    import qwix

    dtype, calibration = FORMATS[quantize]
    channels = [dim for dim in range(a.ndim) if dim not in contracted]
    a = _without_reduced(a).astype(jnp.float32)
    return qwix.quantize(a, dtype, channelwise_axes=channels, calibration_method=calibration)


def _without_reduced(a: jax.Array) -> jax.Array:
    """Removes *reduced* axes from the type, for elementwise operations; moves no data."""
    return jax.reshard(a, jax.typeof(a).sharding.spec.update(reduced=frozenset()))


def _with_reduced_scales(a: "QArray", unreduced: frozenset[str]) -> "QArray":
    """Makes scales *reduced* over these axes, so that JAX allows to multiply partial sums with them."""
    spec = jax.typeof(a.scale).sharding.spec
    return replace(a, scale=jax.reshard(a.scale, spec.update(reduced=unreduced)))
