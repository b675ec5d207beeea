"""The gated delta rule in chunks agrees with its recurrence, also over sharded sequences: to 2e-6 of the largest."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxinfra.ops.gated_delta import Blocks, gated_delta_rule, l2_normalize, short_convolution
from jaxinfra.parallel.context import SequenceSharding
from jaxinfra.parallel.mesh import make_mesh
from jaxinfra.parallel.mesh_config import MeshConfig
from tests.models.harness import relative_error

ROWS, LENGTH, GROUPS, HEADS, KEY_DIM, VALUE_DIM, WIDTH = 2, 150, 2, 4, 16, 8, 4
TOLERANCE = 2e-6
# Borders in the middle of a chunk, at its ends, and around documents of one token.
DOCUMENTS = np.zeros((ROWS, LENGTH), np.int32)
for row, borders in enumerate([(6, 7, 70), (3, 64, 100, 127, 128)]):
    DOCUMENTS[row] = np.searchsorted(borders, np.arange(LENGTH), side="right")

type Arrays = tuple[np.ndarray, ...]


def arrays(decay: np.ndarray | None = None) -> Arrays:
    """Queries, keys that are much alike, values, logarithms of decays between -10 and -0.01, and betas."""
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, ROWS, LENGTH, GROUPS, KEY_DIM))
    g = -np.exp(rng.uniform(np.log(0.01), np.log(10), (ROWS, LENGTH, HEADS))) if decay is None else decay
    beta = 1 / (1 + np.exp(-rng.normal(size=(ROWS, LENGTH, HEADS))))
    return unit(q), unit(k + 1), rng.normal(size=(ROWS, LENGTH, HEADS, VALUE_DIM)), g, beta


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def recurrence(segments: np.ndarray | None, q: Any, k: Any, v: Any, g: Any, beta: Any, state: Any) -> tuple[Any, Any]:
    """Token by token; the state of a head is `[K, V]`."""
    q, k = (jnp.repeat(x, HEADS // GROUPS, axis=2) for x in (q, k))
    decay = jnp.exp(g)
    if segments is not None:
        first = np.diff(segments, axis=1, prepend=segments[:, :1]) != 0
        decay = jnp.where(first[..., None], 0, decay)

    def step(state: Any, token: Any) -> tuple[Any, Any]:
        q, k, v, decay, beta = token
        state *= decay[..., None, None]
        error = v - jnp.einsum("bhk,bhkv->bhv", k, state)
        state += beta[..., None, None] * k[..., None] * error[..., None, :]
        return state, jnp.einsum("bhk,bhkv->bhv", q, state)

    tokens = tuple(jnp.swapaxes(x, 0, 1) for x in (q, k, v, decay, beta))
    state, y = jax.lax.scan(step, state, tokens)
    return jnp.swapaxes(y, 0, 1), state


def results(rule: Callable[..., tuple[Any, Any]], inputs: Arrays, dtype: Any) -> list[np.ndarray]:
    """Returns the outputs, the last state, and the gradients of a weighted sum of both."""
    rng = np.random.default_rng(1)
    weights = [rng.normal(size=(ROWS, LENGTH, HEADS, VALUE_DIM)), rng.normal(size=(ROWS, HEADS, KEY_DIM, VALUE_DIM))]

    def total(*inputs: Any) -> tuple[Any, Any]:
        found = rule(*inputs)
        return sum((x * w.astype(dtype)).sum() for x, w in zip(found, weights, strict=True)), found

    placed = [jnp.asarray(x, dtype) for x in inputs]
    gradients, found = jax.jit(jax.grad(total, argnums=range(len(placed)), has_aux=True))(*placed)
    return [*map(np.asarray, found), *map(np.asarray, gradients)]


@pytest.mark.parametrize("segments", [None, DOCUMENTS], ids=["given state", "documents"])
def test_outputs_and_gradients_equal_those_of_the_recurrence(segments: np.ndarray | None) -> None:
    state = np.random.default_rng(2).normal(size=(ROWS, HEADS, KEY_DIM, VALUE_DIM))
    inputs = (*arrays(), state)

    def chunked(*inputs: Any) -> tuple[Any, Any]:
        blocks = Blocks(segments_BT=None if segments is None else jnp.asarray(segments))
        return gated_delta_rule(*inputs[:5], blocks=blocks, state_BHKV=inputs[5])

    with jax.enable_x64(True):
        expected = results(lambda *inputs: recurrence(segments, *inputs), inputs, jnp.float64)
    for found, wanted in zip(results(chunked, inputs, jnp.float32), expected, strict=True):
        assert relative_error(found, wanted) < TOLERANCE


def test_a_strong_decay_before_costs_no_digits() -> None:
    """Sums of logarithms reach -1000 in the first chunk, where float32 has steps of 6e-5."""
    inputs = arrays(decay=np.where(np.arange(LENGTH) < 50, -20.0, -0.01)[None, :, None] * np.ones((ROWS, 1, HEADS)))
    with jax.enable_x64(True):
        empty = jnp.zeros((ROWS, HEADS, KEY_DIM, VALUE_DIM))
        expected, _ = recurrence(None, *map(jnp.asarray, inputs), empty)
    found, _ = jax.jit(gated_delta_rule)(*(jnp.asarray(x, jnp.float32) for x in inputs))
    assert relative_error(found[:, 50:60], expected[:, 50:60]) < TOLERANCE


@pytest.mark.parametrize(
    ("length", "shards", "zigzag"),
    [(144, 4, False), (144, 4, True), (16, 8, True)],
    ids=["consecutive", "zigzag", "blocks shorter than the convolution"],
)
def test_sharded_sequences_have_the_same_outputs_and_gradients(length: int, shards: int, zigzag: bool) -> None:
    sharding = SequenceSharding(axes=("context",), num_shards=shards, zigzag=zigzag)
    mesh = make_mesh(MeshConfig(fsdp=1, context=shards), jax.devices()[:shards])
    weight = jnp.asarray(np.random.default_rng(3).normal(size=(WIDTH, GROUPS, KEY_DIM)), jnp.float32)
    inputs = [x[:, :length].astype(np.float32) for x in arrays()]
    of_sum = np.random.default_rng(4).normal(size=(ROWS, length, HEADS, VALUE_DIM)).astype(np.float32)
    segments = DOCUMENTS[:, :length]

    def apply(sharding: SequenceSharding, segments: Any, q: Any, k: Any, *others: Any) -> Any:
        blocks = Blocks(sharding=sharding, segments_BT=segments)
        k = l2_normalize(short_convolution(k, weight, blocks))
        return gated_delta_rule(q, k, *others, blocks=blocks)[0]

    def on_mesh(segments: Any, *inputs: Any) -> Any:
        spec = P(None, "context")
        mapped = jax.shard_map(lambda *a: apply(sharding, *a), in_specs=(spec,) * 6, out_specs=spec)
        return mapped(segments, *inputs)

    def values_and_gradients(fun: Callable[..., Any], of_sum: Any, segments: Any, *inputs: Any) -> list[Any]:
        def total(*inputs: Any) -> tuple[Any, Any]:
            y = fun(segments, *inputs)
            return (y * of_sum).sum(), y

        gradients, y = jax.jit(jax.grad(total, argnums=range(5), has_aux=True))(*inputs)
        return [y, *gradients]

    expected = values_and_gradients(lambda *a: apply(SequenceSharding(), *a), of_sum, segments, *inputs)
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(np.asarray(sharding.to_shard_order(x, 1)), NamedSharding(mesh, P(None, "context")))
            for x in map(jnp.asarray, (of_sum, segments, *inputs))
        ]
        found = values_and_gradients(on_mesh, *placed)
    for one, wanted in zip(found, expected, strict=True):
        natural = sharding.to_natural_order(jnp.asarray(np.asarray(one)), 1)
        assert relative_error(natural, wanted) < TOLERANCE
