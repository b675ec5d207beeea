"""Quantized products are near the exact ones by what their formats say, and do not depend on the mesh."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxinfra.ops.dot import dot
from jaxinfra.ops.quantized import gather_quantized, quantize_array
from jaxinfra.parallel.mesh import make_mesh
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.parallel.rules import Quantize
from jaxinfra.parallel.sharding import Partitioner

type Array = np.ndarray | jax.Array

ERRORS: dict[Quantize, float] = {"int8": 0.0106, "fp8": 0.0375}
"""Root mean square error of a product of normal numbers, K = 512, as a part of the product.

A factor rounded to steps of s is off by s / sqrt(12). int8: the largest of 512 normal numbers is near 3.3, so s is
3.3 / 127. E4M3: s is between 1/16 and 1/8 of the number, on the average 0.026 off. Both factors: sqrt(2) of that.
"""


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32)


def relative_error(actual: jax.Array, expected: np.ndarray) -> float:
    return float(np.sqrt(((actual - expected) ** 2).mean() / (expected**2).mean()))


@functools.partial(jax.jit, static_argnames=("quantize", "in_dims", "flatten"))
def multiply(x: Array, w: Array, quantize: Quantize, *, in_dims: int = 1, flatten: bool = True) -> jax.Array:
    """Contracts the first `in_dims` dimensions of a weight of one device, quantized."""
    x, w = jnp.asarray(x), jnp.asarray(w)
    quantized_w = quantize_array(jax.lax.stop_gradient(w), range(in_dims), quantize)
    return dot(x, w, in_dims=in_dims, flatten=flatten, quantized_w=quantized_w)


@pytest.fixture(autouse=True)
def on_one_device():
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])):
        yield


@pytest.mark.parametrize("quantize", ERRORS)
def test_errors_are_those_of_the_format(quantize: Quantize) -> None:
    """For the output and the gradient of activations; the gradient of the weight is exact."""
    x, w, g = normal(64, 512), normal(512, 512), normal(64, 512, seed=1)
    y, vjp = jax.vjp(lambda x, w: multiply(x, w, quantize), x, w)
    dx, dw = vjp(g)
    for actual, expected in ((y, x @ w), (dx, g @ w.T)):
        assert relative_error(actual, expected) == pytest.approx(ERRORS[quantize], rel=0.06)
    np.testing.assert_allclose(dw, x.T @ g, rtol=0, atol=1e-4)


@pytest.mark.parametrize("quantize", ERRORS)
def test_every_row_and_column_has_a_scale(quantize: Quantize) -> None:
    """Scaling rows, columns and gradients by up to a million scales the result only."""
    x, w, g = (jnp.asarray(a) for a in (normal(4, 64), normal(64, 4), normal(4, 4, seed=1)))
    rows, columns = (
        np.float32(2.0) ** np.array(powers, np.float32) for powers in ([[-20], [0], [5], [20]], [20, 0, -3, -20])
    )
    y, vjp = jax.vjp(lambda x: multiply(x, w, quantize), x)
    scaled, vjp_scaled = jax.vjp(lambda x: multiply(x, w * columns, quantize), x * rows)
    np.testing.assert_allclose(scaled, y * rows * columns, rtol=1e-6)
    np.testing.assert_allclose(vjp_scaled(g / columns * rows)[0], vjp(g)[0] * rows, rtol=1e-6)


@pytest.mark.parametrize("quantize", ERRORS)
def test_zeros_and_the_largest_number_are_exact(quantize: Quantize) -> None:
    x = jnp.array([[0.0, 0.0, 0.0], [3.0, -1e-9, -3.0]])
    np.testing.assert_allclose(multiply(x, jnp.eye(3), quantize), np.where(np.abs(x) > 1, x, 0), rtol=1e-6)


MESHES = [
    MeshConfig(fsdp=8),
    MeshConfig(replica=2, fsdp=2, tensor=2),
    MeshConfig(fsdp=2, context=2, tensor=2),
    MeshConfig(fsdp=1, tensor=8),
]


def on_mesh(
    mesh: MeshConfig, quantize: Quantize, x: np.ndarray, w: np.ndarray, g: np.ndarray, *, row_parallel: bool
) -> tuple[np.ndarray, ...]:
    """Computes output and gradients; `tensor` shards output features, or contracted ones if `row_parallel`."""
    partitioner = Partitioner(mesh=mesh, quantize=quantize)
    features = ("mlp", "embed") if row_parallel else ("embed", "mlp")
    stored = partitioner.spec(*features)
    unreduced = frozenset(partitioner.mesh_axes("mlp") if row_parallel else ())

    def run(x, w):
        if not row_parallel:
            x = partitioner.shard(x, "batch", "sequence", None, out_axis="mlp")
        quantized_w = gather_quantized(partitioner, w, features, ("batch", "sequence"), in_dims=1)
        y = dot(x, partitioner.gather_weight(w, features), unreduced=unreduced, quantized_w=quantized_w)
        return partitioner.shard(y, "batch", "sequence", None if row_parallel else "mlp")

    made = make_mesh(mesh, jax.devices())
    with jax.set_mesh(made):
        at = partitioner.spec("batch", "sequence", "mlp" if row_parallel else None)
        put = [jax.device_put(a, NamedSharding(made, s)) for a, s in ((x, at), (w, stored))]
        y, vjp = jax.vjp(jax.jit(run), *put)
        dx, dw = jax.jit(vjp)(jax.device_put(g, y.sharding))
    return tuple(np.asarray(a) for a in (y, dx, dw))


def test_a_step_gathers_one_byte_a_number() -> None:
    """Output and both gradients need no weight in full precision; only its shards are read.

    Not tested with float8, which CPUs gather as float16.
    """
    mesh = MeshConfig(fsdp=8)
    partitioner, made = Partitioner(mesh=mesh, quantize="int8"), make_mesh(mesh, jax.devices())

    def run(x: jax.Array, w: jax.Array) -> jax.Array:
        quantized_w = gather_quantized(partitioner, w, ("embed", "mlp"), ("batch", "sequence"), in_dims=1)
        return (dot(x, partitioner.gather_weight(w, ("embed", "mlp")), quantized_w=quantized_w) ** 2).sum()

    with jax.set_mesh(made):
        specs = partitioner.spec("batch", "sequence", None), partitioner.spec("embed", "mlp")
        arrays = [
            jax.device_put(a, NamedSharding(made, spec))
            for a, spec in zip((normal(8, 4, 64), normal(64, 128)), specs, strict=True)
        ]
        text = jax.jit(jax.grad(run, (0, 1))).lower(*arrays).compile().as_text()
    assert text is not None
    gathered = set(re.findall(r"= (\w+\[[\d,]+\])\S* all-gather\(", text))
    assert gathered == {"s8[64,128]"}, gathered


@pytest.mark.parametrize("row_parallel", [False, True], ids=["column", "row_parallel"])
@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: "-".join(map(str, mesh.sizes)))
@pytest.mark.parametrize("quantize", ERRORS)
def test_results_do_not_depend_on_the_mesh(quantize: Quantize, mesh: MeshConfig, row_parallel: bool) -> None:
    """To 1e-6 of the largest, far below a step of either format; int8 sums are exact where no shard is added up."""
    x, w, g = normal(8, 4, 64), normal(64, 128), normal(8, 4, 128, seed=1)
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])):
        y, vjp = jax.vjp(lambda x, w: multiply(x, w, quantize), x, w)
        expected = (y, *vjp(g))
    actual = on_mesh(mesh, quantize, x, w, g, row_parallel=row_parallel)
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6 * np.abs(other).max())
    if quantize == "int8" and not row_parallel:
        assert np.array_equal(actual[0], expected[0])


@pytest.mark.parametrize("quantize", ERRORS)
def test_unflattened_dimensions_share_their_scales(quantize: Quantize) -> None:
    """Heads contracted, and heads yielded, as on TPU: the same as one dimension, gradients included."""
    for x_shape, w_shape, in_dims in (((2, 4, 3, 16), (3, 16, 32), 2), ((2, 4, 32), (32, 3, 16), 1)):
        x, w = jnp.asarray(normal(*x_shape)), jnp.asarray(normal(*w_shape))
        actual = []
        for flatten in (True, False):
            y, vjp = jax.vjp(functools.partial(multiply, quantize=quantize, in_dims=in_dims, flatten=flatten), x, w)
            actual.append((y, *vjp(jnp.asarray(normal(*y.shape, seed=1)))))
        for one, other in zip(*actual, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-6 * np.abs(other).max())
