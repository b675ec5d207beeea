"""Matmuls of activations with weights in int8 or float8, for training.

qwix quantizes both operands dynamically. Every row of the activations and every column of the weight has a scale,
`max|.| / largest number of the format`, over the whole contracted dimension. The maximum is taken over all shards, so
results do not depend on the mesh. No state is kept between steps.

Two of the three matmuls of a training step are quantized: the forward pass and the gradient of the activations. The
gradient of the weight is not: it contracts rows, so its scales would depend on the whole batch. It uses the
unquantized activations.

In JAX an *unreduced* array is a partial sum on each device; a *reduced* one is replicated, with *unreduced* gradients.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax
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


def dot_general(
    x: jax.Array, w: jax.Array, dimension_numbers: lax.DotDimensionNumbers, out: PartitionSpec, quantize: Quantize
) -> jax.Array:
    """Multiplies like `lax.dot_general` with quantized operands, summed in int32 or float32; in the dtype of `x`.

    `out` is the sharding of the result.
    """
    import qwix

    (x_in, w_in), _ = dimension_numbers
    y = qwix.dot_general(
        _with_reduced_scales(_quantize(x, x_in, quantize), out.unreduced),
        _with_reduced_scales(_quantize(w, w_in, quantize), out.unreduced),
        dimension_numbers,
        preferred_element_type=jnp.float32,
        out_sharding=out,
    )
    return y.astype(x.dtype)


def input_gradient(
    x: jax.Array, w: jax.Array, g: jax.Array, dimension_numbers: lax.DotDimensionNumbers, quantize: Quantize
) -> jax.Array:
    """Computes the gradient of `x` in `dot_general` with quantized operands; `g` is the gradient of the result.

    This matmul contracts the columns of the weight. Their scales are multiplied into `g` before it is quantized (as in
    AQT and qwix), so the quantized weight is exactly the one of the forward pass.
    """
    import qwix

    (_, w_in), (batch, _) = dimension_numbers
    spec = jax.typeof(x).sharding.spec
    out = spec.update(reduced=spec.unreduced, unreduced=spec.reduced)
    w_out = tuple(dim for dim in range(w.ndim) if dim not in (*batch, *w_in))
    g_out = tuple(range(g.ndim - len(w_out), g.ndim))
    weight = _quantize(w, w_in, quantize)
    # From [batch, columns] to [batch, 1, ..., columns], to broadcast against `g`.
    column_scales = jnp.expand_dims(weight.scale.squeeze(w_in), tuple(range(len(batch), g_out[0])))
    scaled_g = _quantize(_without_reduced(g).astype(jnp.float32) * column_scales, g_out, quantize)
    dx = qwix.dot_general(
        _with_reduced_scales(scaled_g, out.unreduced),
        weight.qvalue,
        ((g_out, w_out), (batch, batch)),
        preferred_element_type=jnp.float32,
        out_sharding=out,
    )
    return dx.astype(x.dtype)


def _quantize(a: jax.Array, contracted: Sequence[int], quantize: Quantize) -> "QArray":
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
