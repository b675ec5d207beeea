"""What is counted as memory is what the TPU compiler holds against the size of a chip."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxinfra.parallel.mesh import MeshConfig, make_mesh
from jaxinfra.plan.compiled import memory_of, no_cache
from jaxinfra.plan.topology import devices, parse, prepare

ON = parse("v5p:2x2x1")
WIDTH = 4096
GIB = 2**30


def lowered(layers: int):
    """A step that gives its weights away, whose memory grows by the same bytes with every layer."""

    def loss(weights, x):
        def layer(x, w):
            return jnp.tanh(x @ jax.reshard(w, PartitionSpec())), None

        return jax.lax.scan(layer, x, weights)[0].sum()

    def step(weights, x):
        return weights - 1e-3 * jax.grad(loss)(weights, x)

    mesh = make_mesh(MeshConfig(fsdp=ON.count), devices(ON))
    with jax.set_mesh(mesh):
        shapes = (
            ((layers, WIDTH, WIDTH), PartitionSpec(None, "fsdp")),
            ((ON.count * WIDTH, WIDTH), PartitionSpec("fsdp")),
        )
        given = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, at)) for shape, at in shapes]
        return jax.jit(step, donate_argnums=0).lower(*given)


def counted_gib(layers: int) -> float:
    with no_cache():
        memory = memory_of(lowered(layers).compile())
    return (memory.total - memory.code) / GIB


def test_the_count_goes_on_where_the_compiler_refuses() -> None:
    prepare(ON)
    fewer, more = counted_gib(400), counted_gib(500)
    assert 1.2 * fewer < more < ON.chip.hbm_bytes / GIB
    with pytest.raises(jax.errors.JaxRuntimeError) as refused, no_cache():
        lowered(700).compile()
    said = re.search(r"required for HLO temporaries \(([\d.]+)G\)", str(refused.value))
    assert said, refused.value
    assert float(said[1]) == pytest.approx(more + 2 * (more - fewer), rel=2e-3)
