"""Products of activations with weights whose factors are int8 or float8, for training.

Factors are rounded on the spot, by qwix: every row of the activations and every column of the weight has a scale of
its own, `max|.| / largest number of the format`, over the whole contracted dimension. A scale is a maximum over all
shards of that dimension, so the numbers do not depend on the mesh. Nothing is remembered from step to step.

Of the three products of a training step two are quantized: the forward one and the gradient of the activations. The
gradient of the weight contracts rows, whose scales would have to be agreed on across the whole batch, `replica`
included: it stays in the dtype of its factors, from activations that were not rounded.
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
"""The number format of both factors, and what qwix makes scales of.

With a scale a row float8 needs range less than digits, in gradients too: E4M3 everywhere (DeepSeek-V3, section 3.3).
By itself qwix has the largest number at 127.5 steps of int8, where the last bit of a scale decides between two
integers; here it is at 127.
"""


def product(
    x: jax.Array, w: jax.Array, partial: frozenset[str], contract: int, stages: int, quantize: Quantize
) -> jax.Array:
    """The contraction of `x` and `w` with quantized factors, summed in int32 or float32.

    Args:
        x: `[*S, ..., *K]`.
        w: `[*S, *K, *N]`, ready for use.
        partial: the mesh axes that `K` is sharded over, if the result is to stay a partial sum over them.
        contract: number of dimensions in `K`.
        stages: number of dimensions in `S`.
        quantize: the format.

    Returns:
        `[*S, ..., *N]` in the dtype of `x`, sharded like the rows and the columns.
    """
    import qwix

    x_spec, w_spec = (jax.typeof(a).sharding.spec for a in (x, w))
    in_x, in_w = (tuple(range(at, at + contract)) for at in (x.ndim - contract, stages))
    columns = w_spec.partitions[stages + contract :]
    out = PartitionSpec(*x_spec.partitions[: x.ndim - contract], *columns, unreduced=partial)
    y = qwix.dot_general(
        _marked(_scaled(x, in_x, quantize), partial),
        _marked(_scaled(w, in_w, quantize), partial),
        ((in_x, in_w), (range(stages), range(stages))),
        preferred_element_type=jnp.float32,
        out_sharding=out,
    )
    return y.astype(x.dtype)


def input_gradient(
    x: jax.Array, w: jax.Array, g: jax.Array, contract: int, stages: int, quantize: Quantize
) -> jax.Array:
    """The gradient of `x` in `product`, of quantized factors, from that of the result.

    The scales of the weight's columns, which are contracted here, go into `g` before it is rounded
    (as in AQT and qwix): so the weight is the one of the forward product, to the bit.
    """
    import qwix

    spec = jax.typeof(x).sharding.spec
    out = spec.update(reduced=spec.unreduced, unreduced=spec.reduced)
    weight = _scaled(w, tuple(range(stages, stages + contract)), quantize)
    in_w = tuple(range(stages + contract, w.ndim))
    in_g = tuple(range(g.ndim - len(in_w), g.ndim))
    rows = tuple(range(stages, in_g[0]))
    column_scales = jnp.expand_dims(weight.scale.squeeze(tuple(range(stages, stages + contract))), rows)
    factor = _scaled(_unmarked(g).astype(jnp.float32) * column_scales, in_g, quantize)
    dx = qwix.dot_general(
        _marked(factor, out.unreduced),
        weight.qvalue,
        ((in_g, in_w), (range(stages), range(stages))),
        preferred_element_type=jnp.float32,
        out_sharding=out,
    )
    return dx.astype(x.dtype)


def _scaled(a: jax.Array, contracted: tuple[int, ...], quantize: Quantize) -> "QArray":
    """Quantized, with one scale for all numbers along these dimensions."""
    import qwix

    dtype, scale = FORMATS[quantize]
    scales = [dim for dim in range(a.ndim) if dim not in contracted]
    wide = _unmarked(a).astype(jnp.float32)
    return qwix.quantize(wide, dtype, channelwise_axes=scales, calibration_method=scale)


def _unmarked(a: jax.Array) -> jax.Array:
    """The same array without marks of reduced axes, for elementwise work; moves nothing."""
    return jax.reshard(a, jax.typeof(a).sharding.spec.update(reduced=frozenset()))


def _marked(a: "QArray", partial: frozenset[str]) -> "QArray":
    """Scales marked as reduced, so that they may multiply sums that are partial over these axes."""
    spec = jax.typeof(a.scale).sharding.spec
    return replace(a, scale=jax.reshard(a.scale, spec.update(reduced=partial)))
