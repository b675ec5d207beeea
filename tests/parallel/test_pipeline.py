"""Every schedule gives the gradients of GPipe written as one differentiable program.

That reference is a scan of forward ticks on one device, with all layers side by side, differentiated by JAX.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxinfra.ops.dot import dot
from jaxinfra.parallel.mesh import make_mesh
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.parallel.pipeline import Pipeline, StepInputs
from jaxinfra.parallel.schedules import PipelineConfig
from jaxinfra.program.pipeline_engine import assign_layers

MICROBATCHES, ROWS, POSITIONS, WIDTH = 4, 8, 4, 8
AUX_WEIGHT = 0.05
MESH = MeshConfig(stage=4, fsdp=2)
OVER_ROWS = P(("stage", "fsdp"), None, None)

SCHEDULES = {
    "gpipe": PipelineConfig(schedule="gpipe"),
    "1f1b": PipelineConfig(schedule="1f1b"),
    "zero bubble": PipelineConfig(schedule="zero_bubble"),
    "two chunks": PipelineConfig(schedule="interleaved", chunks=2),
}


class Toy:
    """Layers `x + tanh(x w)` between two matmuls, with a squared error and an auxiliary loss of sums of squares."""

    def embed(self, shared: Any, rows: Any) -> jax.Array:
        return dot(rows["x"], shared["in"])

    def apply_layers(self, weights: Any, x: jax.Array, rows: Any, layer_indices: jax.Array) -> tuple[jax.Array, Any]:
        def layer(x: jax.Array, xs: Any) -> tuple[jax.Array, jax.Array]:
            w, number = xs
            y = dot(x, w)

            def own(x: jax.Array, y: jax.Array, number: jax.Array) -> tuple[jax.Array, jax.Array]:
                real = number[0] >= 0
                y = jnp.where(real, x + jnp.tanh(y), x)
                return y, jnp.where(real, jnp.sum(y**2), 0)[None, None]

            specs = {"in_specs": (OVER_ROWS, OVER_ROWS, P("stage")), "out_specs": (OVER_ROWS, P("stage", "fsdp"))}
            return jax.shard_map(own, **specs)(x, y, number)

        x, squares = jax.lax.scan(layer, x, (weights, layer_indices))
        return x, {"squares": squares}

    def output_loss(self, shared: Any, x: jax.Array, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        spec = jax.typeof(x).sharding.spec
        error = dot(x, shared["out"]) - jax.reshard(batch["y"], spec)
        axes = frozenset(("stage", "fsdp"))
        total = jnp.einsum("btd,btd->", error, error, out_sharding=P(unreduced=axes))
        return total, {"loss": total}

    def aux_loss(self, stats: Any) -> jax.Array:
        axes = ("stage", "fsdp")

        def own(squares: jax.Array) -> jax.Array:
            return jax.lax.pcast(AUX_WEIGHT * squares.sum(), axes, to="unreduced")

        over_devices = {"in_specs": P(None, *axes), "out_specs": P(unreduced=set(axes))}
        return jax.shard_map(own, **over_devices)(stats["squares"])


@functools.cache
def values(layers: int) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray]]:
    draw = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return draw.normal(size=shape).astype(np.float32)

    weights = normal(layers, WIDTH, WIDTH) / WIDTH**0.5
    shared = {name: normal(WIDTH, WIDTH) / WIDTH**0.5 for name in ("in", "out")}
    return weights, shared, {name: normal(MICROBATCHES, ROWS, POSITIONS, WIDTH) for name in ("x", "y")}


@functools.cache
def reference(layers: int) -> tuple[Any, Any]:
    """Returns loss and gradients of GPipe as one differentiable scan, with a layer a stage."""
    weights, shared, batch = jax.tree.map(jnp.asarray, values(layers))
    ticks = MICROBATCHES + layers - 1

    def total(weights: jax.Array, shared: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        def tick(carry: Any, t: jax.Array) -> tuple[Any, None]:
            stream_SBTD, loss, aux_loss = carry
            first = batch["x"][jnp.minimum(t, MICROBATCHES - 1)] @ shared["in"]
            x = jnp.roll(stream_SBTD, 1, axis=0).at[0].set(first)
            y = x + jnp.tanh(jnp.einsum("sbtd,sde->sbte", x, weights))
            at = t - jnp.arange(layers)
            real = (at >= 0) & (at < MICROBATCHES)
            aux_loss += AUX_WEIGHT * jnp.sum(jnp.where(real[:, None, None, None], y, 0) ** 2)
            left = t - (layers - 1)
            error = y[-1] @ shared["out"] - batch["y"][jnp.maximum(left, 0)]
            return (y, loss + jnp.where(left >= 0, jnp.sum(error**2), 0), aux_loss), None

        empty = jnp.zeros((layers, ROWS, POSITIONS, WIDTH))
        (_, loss, aux_loss), _ = jax.lax.scan(tick, (empty, 0.0, 0.0), jnp.arange(ticks))
        return loss + aux_loss, loss

    with jax.default_matmul_precision("highest"):
        (_, loss), grads = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(weights, shared)
    return np.asarray(loss), jax.tree.map(np.asarray, grads)


def by_chunk(weights: np.ndarray, layer_indices: np.ndarray) -> np.ndarray:
    """Maps `[layers, ...]` to `[V, L, S, ...]`, with zeros for no layer."""
    return np.where((layer_indices >= 0)[..., None, None], weights[np.maximum(layer_indices, 0)], 0)


@pytest.mark.parametrize(
    ("kind", "layers", "dim"),
    [
        ("gpipe", 8, 1),
        ("1f1b", 8, 0),
        ("1f1b", 10, 1),
        ("zero bubble", 10, 0),
        ("two chunks", 8, 1),
        ("two chunks", 10, 0),
    ],
)
def test_gradients_equal_those_of_differentiable_gpipe(kind: str, layers: int, dim: int) -> None:
    weights, shared, batch = values(layers)
    config = SCHEDULES[kind]
    layer_indices = assign_layers(layers, MESH.stage, config.chunks)
    loss_spec = P(("fsdp", "stage"), None, None) if dim == 0 else P("fsdp", "stage", None)
    pipeline = Pipeline(Toy(), config.make_schedule(MESH.stage, MICROBATCHES), loss_spec, layer_indices)
    with jax.set_mesh(make_mesh(MESH, jax.devices()[:8])):
        put = functools.partial(jax.tree.map, lambda a, spec: jax.reshard(jnp.asarray(a), spec))
        placed = put(by_chunk(weights, layer_indices), P(None, None, "stage", None, None, reduced={"fsdp"}))
        shared_spec = P(None, None, reduced={"stage", "fsdp"})
        inputs = StepInputs(
            placed,
            put(shared, dict.fromkeys(shared, shared_spec)),
            put(batch, dict.fromkeys(batch, P(None, "fsdp", None, None))),
        )
        found, found_shared, sums, stats = jax.jit(pipeline.gradients)(inputs)
        found = np.asarray(jax.reshard(found, P()))
        found_shared = jax.tree.map(lambda a: np.asarray(jax.reshard(a, P())), found_shared)
        loss = float(jax.reshard(sums["loss"], P()))
        squares = np.asarray(jax.reshard(stats["squares"], P()))
    wanted_loss, (wanted, wanted_shared) = reference(layers)
    assert loss == pytest.approx(float(wanted_loss), rel=1e-5)
    np.testing.assert_allclose(found, by_chunk(wanted, layer_indices), rtol=2e-5, atol=2e-5 * np.abs(wanted).max())
    for name, one in wanted_shared.items():
        np.testing.assert_allclose(found_shared[name], one, rtol=2e-5, atol=2e-5 * np.abs(one).max())
    assert ((squares > 0).all(-1) == (layer_indices >= 0)).all()


@pytest.mark.parametrize(
    ("layers", "stages", "chunks", "wanted"),
    [
        (4, 2, 1, [[[0, 2], [1, 3]]]),
        (5, 2, 1, [[[0, 3], [1, 4], [2, -1]]]),
        (5, 2, 2, [[[0, 2], [1, -1]], [[3, 4], [-1, -1]]]),
    ],
)
def test_layers_are_assigned_in_the_order_of_the_model(layers: int, stages: int, chunks: int, wanted: list) -> None:
    assert assign_layers(layers, stages, chunks).tolist() == wanted
