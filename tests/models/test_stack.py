"""`scan_pattern` compiles a pattern once, for any number of layers."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxinfra.models.stack import Step, scan_pattern
from jaxinfra.parallel.mesh import make_mesh
from jaxinfra.parallel.mesh_config import MeshConfig

WIDTH = 8


def step(scale: int) -> Step:
    """Returns a step function; other scales give other functions."""

    def through(x: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
        x = jax.reshard(jnp.tanh(x @ layer["w"]) * scale, P())
        return x, {"mean": x.mean()}

    return through


def test_a_pattern_is_compiled_once() -> None:
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=1, tensor=2), jax.devices()[:2])):
        x, w = jnp.ones((4, WIDTH)), jnp.ones((60, WIDTH, WIDTH))
        text = jax.jit(lambda x, w: scan_pattern([step(1), step(2)], x, {"w": w})).lower(x, w).as_text()
    assert text.count("dot_general") == 2
