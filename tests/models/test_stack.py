"""A pattern repeated over layers is those layers one after the other, whatever is left over at the end."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxinfra.models.stack import Step, scan_pattern
from jaxinfra.parallel.mesh import MeshConfig, make_mesh

LAYERS, WIDTH = 5, 8


def on_two_devices() -> Any:
    return jax.set_mesh(make_mesh(MeshConfig(fsdp=1, tensor=2), jax.devices()[:2]))


def steps(count: int) -> list[Step]:
    """Steps of which each does something else."""

    def step(scale: int) -> Step:
        def through(x: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
            x = jax.reshard(jnp.tanh(x @ layer["w"]) * scale, P())
            return x, {"mean": x.mean(), "row": x[0]}

        return through

    return [step(i + 1) for i in range(count)]


def one_by_one(chosen: list[Step], x: jax.Array, xs: Any) -> tuple[jax.Array, Any]:
    ys = []
    for i in range(LAYERS):
        x, y = chosen[i % len(chosen)](x, jax.tree.map(lambda a, i=i: a[i], xs))
        ys.append(y)
    return x, jax.tree.map(lambda *y: jnp.stack(y), *ys)


@pytest.mark.parametrize("period", [1, 2, 3, 5, 7])
def test_it_is_the_layers_one_after_the_other(period: int) -> None:
    draw = np.random.default_rng(0)
    x, w = draw.normal(size=(4, WIDTH)), draw.normal(size=(LAYERS, WIDTH, WIDTH))
    chosen = steps(period)

    def values_and_slopes(through: Any) -> Any:
        def total(x: jax.Array, xs: Any) -> tuple[jax.Array, Any]:
            y, found = through(chosen, x, xs)
            return (y**2).sum() + (found["row"] ** 2).sum() + found["mean"].sum(), found

        w_spread = jax.reshard(jnp.asarray(w, jnp.float32), P(None, None, "tensor"))
        args = jnp.asarray(x, jnp.float32), {"w": w_spread}
        return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(*args)

    with on_two_devices():
        found, wanted = values_and_slopes(scan_pattern), values_and_slopes(one_by_one)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_a_group_is_compiled_once() -> None:
    with on_two_devices():
        x, w = jnp.ones((4, WIDTH)), jnp.ones((60, WIDTH, WIDTH))
        text = jax.jit(lambda x, w: scan_pattern(steps(2), x, {"w": w})).lower(x, w).as_text()
    assert text.count("dot_general") == 2
