"""`dot` agrees with `np.tensordot`, for any sharding."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxinfra.ops.dot import dot
from jaxinfra.parallel.mesh import make_mesh
from jaxinfra.parallel.mesh_config import MeshConfig

RNG = np.random.default_rng(0)


def values(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "in_dims"),
    [
        ((2, 3, 4), (4, 5), 1),
        ((2, 3, 4), (4, 5, 6), 1),
        ((2, 3, 4, 5), (4, 5, 6), 2),
        ((3, 4), (4, 5), 1),
        ((2, 3, 7, 4, 5), (4, 5, 6, 8), 2),
    ],
)
@pytest.mark.parametrize("flatten", [True, False], ids=["flatten", "unflattened"])
def test_values_and_gradients(x_shape: tuple[int, ...], w_shape: tuple[int, ...], in_dims: int, flatten: bool) -> None:
    """Values and both gradients, to 2e-6 of the largest."""
    x, w = values(*x_shape), values(*w_shape)
    noise = values(*x_shape[: len(x_shape) - in_dims], *w_shape[in_dims:])
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])):
        y, vjp = jax.vjp(lambda x, w: dot(x, w, in_dims=in_dims, flatten=flatten), x, w)
        dx, dw = vjp(noise)
    lead = len(x_shape) - in_dims
    expected = (
        np.tensordot(x, w, in_dims),
        np.tensordot(noise, w, (range(lead, noise.ndim), range(in_dims, w.ndim))),
        np.tensordot(x, noise, (range(lead), range(lead))),
    )
    for actual, value in zip((y, dx, dw), expected, strict=True):
        np.testing.assert_allclose(actual, value, rtol=0, atol=2e-6 * np.abs(value).max())


@pytest.mark.parametrize("shard_length", [False, True], ids=["rank 2", "rank 3"])
@pytest.mark.parametrize("in_dims", [1, 2])
@pytest.mark.parametrize("flatten", [True, False], ids=["flatten", "unflattened"])
def test_partial_sums_are_scattered(flatten: bool, in_dims: int, shard_length: bool) -> None:
    """Contracts over `tensor` and scatters over positions, which another axis may shard too."""
    mesh = make_mesh(MeshConfig(fsdp=2, context=2, tensor=2), jax.devices())
    length = "context" if shard_length else None
    k = (4,) if in_dims == 1 else (4, 3)
    x, w = values(2, 8, *k), values(*k, 5)
    x_spec = PartitionSpec("fsdp", length, "tensor", *(None,) * (in_dims - 1))
    w_spec = PartitionSpec("tensor", *(None,) * in_dims)
    out = PartitionSpec("fsdp", (length, "tensor") if length else "tensor", None)

    def run(x, w):
        y = dot(
            x,
            jax.reshard(w, w_spec.update(reduced={"fsdp", "context"})),
            in_dims=in_dims,
            unreduced=frozenset({"tensor"}),
            flatten=flatten,
        )
        assert jax.typeof(y).sharding.spec.unreduced == {"tensor"}
        return jax.reshard(y, out)

    with jax.set_mesh(mesh):
        placed = (jax.device_put(a, NamedSharding(mesh, s)) for a, s in ((x, x_spec), (w, w_spec)))
        y = jax.jit(run)(*placed)
    expected = np.tensordot(x, w, in_dims)
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    assert y.sharding.spec == out
