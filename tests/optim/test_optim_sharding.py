"""Optimizers give equal results on one device and on eight, with state sharded like the parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxinfra.optim.config import OptimConfig
from jaxinfra.optim.optimizers import SGD, Adafactor, AdamW, Lion, Muon, make_optimizer
from jaxinfra.optim.schedules import Cosine
from jaxinfra.optim.transforms import clip_by_global_norm, ema_update
from tests.optim.conftest import spec

OPTIMIZERS = [AdamW(), Adafactor(min_factored_dim=8), Lion(), SGD(nesterov=True), Muon()]
NAMES = [type(optimizer).__name__ for optimizer in OPTIMIZERS]
MESHES = [{"fsdp": 8, "tensor": 1}, {"fsdp": 4, "tensor": 2}, {"replica": 2, "fsdp": 2, "tensor": 2}]

SHARDINGS = {
    "embedding": P("tensor", "fsdp"),
    "blocks": {
        "q": P(None, "fsdp", "tensor", None),
        "o": P(None, "tensor", None, "fsdp"),
        "scale": P(None, "fsdp"),
        "bias": P(None, "tensor"),
    },
    "prefix": {"up": P(None, "fsdp", "tensor")},
    "head": P("fsdp", "tensor"),
}


def transform(optimizer, specs):
    optim = OptimConfig(optimizer=optimizer, schedule=Cosine(warmup_steps=1), peak_lr=0.1)
    return make_optimizer(optim, steps=4, specs=specs)


def step(tx):
    """Returns the jitted part of a train step after the gradients."""

    def run(params, state, ema, grads, at):
        grads, norm = clip_by_global_norm(grads, 1.0)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return params, state, ema_update(ema, params, 0.9, at), norm

    return jax.jit(run)


def train(tx, draw, place):
    params = place(draw(0))
    state, ema = jax.jit(tx.init)(params), params
    update = step(tx)
    norms = []
    for at in range(3):
        params, state, ema, norm = update(params, state, ema, place(draw(at + 1)), jnp.int32(at))
        norms.append(norm)
    return jax.device_get((params, state, ema, norms))


def sharded(tree):
    return jax.tree.map(jax.device_put, tree, SHARDINGS)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=NAMES)
def test_one_and_eight_devices_agree(specs, draw, optimizer, sizes):
    tx = transform(optimizer, specs)
    want = train(tx, draw, lambda tree: jax.tree.map(jnp.asarray, tree))
    with jax.set_mesh(jax.make_mesh(tuple(sizes.values()), tuple(sizes))):
        got = train(tx, draw, sharded)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


def type_text(x):
    return str(jax.typeof(x))


def shardings(tree):
    return jax.tree.map(lambda x: jax.typeof(x).sharding.spec, tree)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=NAMES)
def test_abstract_and_real_state_have_equal_types(specs, draw, optimizer):
    """Shapes, dtypes and shardings of an abstract state are those of a real one, before and after an update."""
    tx = transform(optimizer, specs)
    with jax.set_mesh(jax.make_mesh((4, 2), ("fsdp", "tensor"))):
        params = sharded(draw(0))
        abstract = jax.eval_shape(
            tx.init,
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.typeof(x).sharding), params),
        )
        state = jax.jit(tx.init)(params)
        updates, after = jax.jit(tx.update)(params, state, params)
        # As text: `eval_shape` leaves the mesh out of the type of an unsharded array.
        assert jax.tree.map(type_text, abstract) == jax.tree.map(type_text, state)
        assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
        assert shardings(updates) == shardings(params)


def test_factored_state_keeps_the_sharding_of_its_dimensions(specs, draw):
    tx = transform(Adafactor(min_factored_dim=8), specs)
    with jax.set_mesh(jax.make_mesh((4, 2), ("fsdp", "tensor"))):
        state = jax.jit(tx.init)(sharded(draw(0)))
        types = {str(jax.typeof(leaf)) for leaf in jax.tree.leaves(state)}
    assert {"float32[3,8@fsdp]", "float32[3,4@tensor,4]", "float32[16@tensor]"} <= types


def projection(layers):
    """Returns the spec of a projection to 4 heads of 4, with `layers` stacked layers; unstacked for 0."""
    if not layers:
        return spec("matrix", (8, 4, 4), "embed", "heads", "head_dim", in_dims=(0,), out_dims=(1, 2))
    return spec("matrix", (layers, 8, 4, 4), "layers", "embed", "heads", "head_dim", in_dims=(1,), out_dims=(2, 3))


@pytest.mark.parametrize(
    ("layers", "sharding"),
    [
        (0, P("fsdp", "tensor", None)),
        (1, P(None, "fsdp", "tensor", None)),
        (3, P(None, "tensor", "fsdp", None)),
        (8, P(None, ("fsdp", "tensor"), None, None)),
        (4, P("stage", "fsdp", "tensor", None)),
        (6, P("stage", "fsdp", None, "tensor")),
        (8, P(("stage", "fsdp"), None, None, "tensor")),
    ],
    ids=str,
)
def test_muon_with_every_kind_of_sharding(layers, sharding):
    tx = transform(Muon(), {"w": projection(layers)})
    value = np.random.default_rng(0).normal(size=projection(layers).shape).astype(np.float32)
    state = tx.init({"w": value})
    for _ in range(2):
        want, state = tx.update({"w": value}, state, {"w": value})
    with jax.set_mesh(jax.make_mesh((2, 2, 2), ("stage", "fsdp", "tensor"))):
        params = {"w": jax.device_put(value, sharding)}
        state = jax.jit(tx.init)(params)
        for _ in range(2):
            got, state = jax.jit(tx.update)(params, state, params)
        assert jax.typeof(got["w"]) == jax.typeof(params["w"])
    np.testing.assert_allclose(got["w"], want["w"], atol=1e-5)


def test_muon_moves_matrices_only_by_all_to_all():
    """Eight layers on eight devices: each device gets one whole matrix."""
    tx = transform(Muon(), {"w": projection(8)})
    with jax.set_mesh(jax.make_mesh((4, 2), ("fsdp", "tensor"))):
        params = {"w": jax.device_put(jnp.ones((8, 8, 4, 4)), P(None, "fsdp", "tensor", None))}
        state = jax.jit(tx.init)(params)
        text = jax.jit(tx.update).lower(params, state, params).compile().as_text()
    assert text.count(" all-to-all(") == 4  # two mesh axes, in both directions
    assert " all-gather(" not in text and " all-reduce(" not in text
    assert "f32[8,8]{1,0} dot(" in text
