"""Matmuls of activations with weights in int8 or float8, for training.

qwix quantizes both operands dynamically. Every row of the activations and every column of the weight has a scale,
`max|.| / largest number of the format`, over the whole contracted dimension. The maximum is taken over all shards, so
results do not depend on the mesh. No state is kept between steps.

Two of the three matmuls of a training step are quantized: the forward pass and the gradient of the activations. The
gradient of the weight is not: it contracts rows, so its scales would depend on the whole batch. It uses the
unquantized activations. So nothing needs a gathered weight in full precision: each device quantizes its shard, and the
quantized shards are gathered.

In JAX an *unreduced* array is a partial sum on each device; a *reduced* one is replicated, with *unreduced* gradients.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxinfra.parallel.rules import LogicalAxes, Quantize
from jaxinfra.parallel.sharding import Partitioner

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


def quantize_array(a: jax.Array, contracted: Sequence[int], quantize: Quantize) -> "QArray":
    """Returns an array as numbers of a format and their scales; elements along the contracted dimensions share one."""
    import qwix

    dtype, calibration = FORMATS[quantize]
    channels = [dim for dim in range(a.ndim) if dim not in contracted]
    a = _without_reduced(a).astype(jnp.float32)
    return qwix.quantize(a, dtype, channelwise_axes=channels, calibration_method=calibration)


def gather_quantized(
    partitioner: Partitioner, weight: jax.Array, names: LogicalAxes, activation_axes: LogicalAxes, *, in_dims: int
) -> "QArray | None":
    """Quantizes the shards of a stored weight and gathers them, if the partitioner says so; takes no gradient.

    The arguments are those of `Partitioner.gather_weight`. The scales are float32, one for each output feature.
    """
    quantize, first = partitioner.quantize, weight.ndim - len(names)  # after a dimension of pipeline stages
    if quantize == "none":
        return None
    weight = lax.stop_gradient(weight).astype(partitioner.compute_dtype)
    shards = quantize_array(weight, range(first, first + in_dims), quantize)
    scale_names = (*[None] * in_dims, *names[in_dims:])
    value = partitioner.gather_weight(shards.qvalue, names, activation_axes, shards.qvalue.dtype)
    scale = partitioner.gather_weight(shards.scale, scale_names, activation_axes, shards.scale.dtype)
    return replace(shards, qvalue=value, scale=scale)


def dot_general(
    x: jax.Array, weight: "QArray", dimension_numbers: lax.DotDimensionNumbers, out: PartitionSpec
) -> jax.Array:
    """Multiplies like `lax.dot_general` with quantized operands, summed in int32 or float32; in the dtype of `x`.

    `out` is the sharding of the result.
    """
    import qwix

    (x_in, _), _ = dimension_numbers
    y = qwix.dot_general(
        _with_reduced_scales(quantize_array(x, x_in, _format_of(weight)), out.unreduced),
        _with_reduced_scales(_usable(weight), out.unreduced),
        dimension_numbers,
        preferred_element_type=jnp.float32,
        out_sharding=out,
    )
    return y.astype(x.dtype)


def input_gradient(
    x: jax.Array, weight: "QArray", g: jax.Array, dimension_numbers: lax.DotDimensionNumbers
) -> jax.Array:
    """Computes the gradient of `x` in `dot_general` with quantized operands; `g` is the gradient of the result.

    This matmul contracts the columns of the weight. Their scales are multiplied into `g` before it is quantized (as in
    AQT and qwix), so the quantized weight is exactly the one of the forward pass.
    """
    import qwix

    (_, w_in), (batch, _) = dimension_numbers
    spec = jax.typeof(x).sharding.spec
    out = spec.update(reduced=spec.unreduced, unreduced=spec.reduced)
    weight = _usable(weight)
    w_out = tuple(dim for dim in range(weight.qvalue.ndim) if dim not in (*batch, *w_in))
    g_out = tuple(range(g.ndim - len(w_out), g.ndim))
    # From [batch, columns] to [batch, 1, ..., columns], to broadcast against `g`.
    column_scales = jnp.expand_dims(weight.scale.squeeze(w_in), tuple(range(len(batch), g_out[0])))
    scaled_g = quantize_array(_without_reduced(g).astype(jnp.float32) * column_scales, g_out, _format_of(weight))
    dx = qwix.dot_general(
        _with_reduced_scales(scaled_g, out.unreduced),
        weight.qvalue,
        ((g_out, w_out), (batch, batch)),
        preferred_element_type=jnp.float32,
        out_sharding=out,
    )
    return dx.astype(x.dtype)


def cast_values(weight: "QArray", dtype: jnp.dtype) -> jax.Array:
    """Returns the numbers of a gathered weight, without their scales, in another dtype and the same sharding."""
    return jax.reshard(_without_reduced(weight.qvalue).astype(dtype), jax.typeof(weight.qvalue).sharding.spec)


def _format_of(weight: "QArray") -> Quantize:
    return next(name for name, (dtype, _) in FORMATS.items() if dtype == weight.qvalue.dtype)


def _usable(weight: "QArray") -> "QArray":
    """Returns a gathered weight without *reduced* axes."""
    return replace(weight, qvalue=_without_reduced(weight.qvalue), scale=_without_reduced(weight.scale))


def _without_reduced(a: jax.Array) -> jax.Array:
    """Removes *reduced* axes from the type, for elementwise operations; moves no data."""
    return jax.reshard(a, jax.typeof(a).sharding.spec.update(reduced=frozenset()))


def _with_reduced_scales(a: "QArray", unreduced: frozenset[str]) -> "QArray":
    """Makes scales *reduced* over these axes, so that JAX allows to multiply partial sums with them."""
    spec = jax.typeof(a.scale).sharding.spec
    return replace(a, scale=jax.reshard(a.scale, spec.update(reduced=unreduced)))
