"""Dropout masks have the requested rate and are independent of each other."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxinfra.ops.dropout import dropout, layer_bits, token_bits
from jaxinfra.parallel.mesh import make_mesh
from jaxinfra.parallel.mesh_config import MeshConfig

BATCH, LENGTH, FEATURES, RATE = 8, 32, 510, 0.3
VALUES = BATCH * LENGTH * FEATURES


def bits(seed: int = 0, step: int = 0) -> jax.Array:
    return token_bits(jax.random.key(seed), jnp.asarray(step), (BATCH, LENGTH))


def mask(bits_BT: jax.Array | None, site: int = 0, rate: float = RATE) -> np.ndarray:
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])):
        return np.asarray(dropout(jnp.ones((BATCH, LENGTH, FEATURES)), bits_BT, site, rate)) > 0


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


NOISE = 5 / VALUES**0.5
"""Five standard deviations of a correlation that is zero."""


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_dropout_keeps_the_mean_and_has_the_requested_rate(rate: float) -> None:
    kept = mask(bits(), rate=rate)
    assert abs(kept.mean() - (1 - rate)) < 5 * (rate * (1 - rate) / VALUES) ** 0.5 + 1e-12
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])):
        out = np.asarray(dropout(jnp.full((BATCH, LENGTH, FEATURES), 2.0), bits(), 0, rate))
    assert set(np.unique(out)) <= {np.float32(0), np.float32(2 / (1 - round(rate * 65536) / 65536))}


def test_masks_are_independent() -> None:
    """Across seeds, steps, layers and sites."""
    seed, step = bits(seed=1), bits(step=1)
    masks = [mask(bits()), mask(bits(), site=1), mask(seed), mask(step)]
    masks += [mask(layer_bits(bits(), number)) for number in (-1, 0, 1)]
    assert max(abs(correlation(a, b)) for a, b in itertools.combinations(masks, 2)) < NOISE


def test_tokens_and_features_are_independent() -> None:
    kept = mask(bits())
    moved = [np.roll(kept, by, axis) for axis, by in ((0, 1), (1, 1), (2, 1), (2, 128), (2, 256))]
    assert max(abs(correlation(kept, other)) for other in moved) < NOISE
    per_token = kept.mean(axis=2)
    assert per_token.std() == pytest.approx((RATE * (1 - RATE) / FEATURES) ** 0.5, rel=0.2)


def test_masks_do_not_depend_on_the_sharding() -> None:
    expected = mask(layer_bits(bits(step=5), 3), site=1)
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, tensor=4), jax.devices())):
        sharded = token_bits(jax.random.key(0), jnp.asarray(5), (BATCH, LENGTH), P("fsdp"))
        ones = jax.reshard(jnp.ones((BATCH, LENGTH, FEATURES)), P("fsdp", "tensor"))
        actual = jax.jit(lambda x, bits: dropout(x, layer_bits(bits, 3), 1, RATE))(ones, sharded)
    assert actual.sharding.spec == P("fsdp", "tensor", None)
    assert np.array_equal(np.asarray(actual) > 0, expected)


def test_pipeline_stages_have_the_bits_of_their_layers() -> None:
    with jax.set_mesh(make_mesh(MeshConfig(stage=2, fsdp=4), jax.devices())):
        both = jax.reshard(jnp.concatenate([bits(), bits()]), P(("stage", "fsdp")))
        numbers = jax.reshard(jnp.array([3, 7]), P("stage"))
        actual = np.asarray(jax.jit(layer_bits)(both, numbers))
    assert np.array_equal(actual, np.concatenate([layer_bits(bits(), 3), layer_bits(bits(), 7)]))
