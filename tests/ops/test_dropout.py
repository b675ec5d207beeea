"""Masks have the rate that was asked for, and no two places share one."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxinfra.ops.dropout import drop, layer_words, token_words
from jaxinfra.parallel.mesh import make_mesh
from jaxinfra.parallel.mesh_config import MeshConfig

ROWS, LENGTH, WIDTH, RATE = 8, 32, 510, 0.3
VALUES = ROWS * LENGTH * WIDTH


def words(seed: int = 0, step: int = 0) -> jax.Array:
    return token_words(jax.random.key(seed), jnp.asarray(step), (ROWS, LENGTH))


def mask(words_BT: jax.Array, site: int = 0, rate: float = RATE) -> np.ndarray:
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])):
        return np.asarray(drop(jnp.ones((ROWS, LENGTH, WIDTH)), words_BT, site, rate)) > 0


def shared(a: np.ndarray, b: np.ndarray) -> float:
    """The correlation of two masks."""
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


NOISE = 5 / VALUES**0.5
"""Five standard deviations of a correlation that is zero."""


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_the_mean_stays_and_the_rate_is_as_asked(rate: float) -> None:
    kept = mask(words(), rate=rate)
    assert abs(kept.mean() - (1 - rate)) < 5 * (rate * (1 - rate) / VALUES) ** 0.5 + 1e-12
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])):
        out = np.asarray(drop(jnp.full((ROWS, LENGTH, WIDTH), 2.0), words(), 0, rate))
    assert set(np.unique(out)) <= {np.float32(0), np.float32(2 / (1 - round(rate * 65536) / 65536))}


def test_no_two_masks_are_related() -> None:
    """Those of other seeds, steps, layers and sites."""
    seed, step = words(seed=1), words(step=1)
    masks = [mask(words()), mask(words(), site=1), mask(seed), mask(step)]
    masks += [mask(layer_words(words(), number)) for number in (-1, 0, 1)]
    assert max(abs(shared(a, b)) for a, b in itertools.combinations(masks, 2)) < NOISE


def test_tokens_and_features_are_not_related() -> None:
    kept = mask(words())
    moved = [np.roll(kept, by, axis) for axis, by in ((0, 1), (1, 1), (2, 1), (2, 128), (2, 256))]
    assert max(abs(shared(kept, other)) for other in moved) < NOISE
    per_token = kept.mean(axis=2)
    assert per_token.std() == pytest.approx((RATE * (1 - RATE) / WIDTH) ** 0.5, rel=0.2)


def test_a_mask_is_the_same_in_any_sharding() -> None:
    wanted = mask(layer_words(words(step=5), 3), site=1)
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, tensor=4), jax.devices())):
        spread = token_words(jax.random.key(0), jnp.asarray(5), (ROWS, LENGTH), P("fsdp"))
        ones = jax.reshard(jnp.ones((ROWS, LENGTH, WIDTH)), P("fsdp", "tensor"))
        found = jax.jit(lambda x, w: drop(x, layer_words(w, 3), 1, RATE))(ones, spread)
    assert found.sharding.spec == P("fsdp", "tensor", None)
    assert np.array_equal(np.asarray(found) > 0, wanted)


def test_stages_have_the_words_of_their_layers() -> None:
    with jax.set_mesh(make_mesh(MeshConfig(stage=2, fsdp=4), jax.devices())):
        both = jax.reshard(jnp.concatenate([words(), words()]), P(("stage", "fsdp")))
        numbers = jax.reshard(jnp.array([3, 7]), P("stage"))
        found = np.asarray(jax.jit(layer_words)(both, numbers))
    assert np.array_equal(found, np.concatenate([layer_words(words(), 3), layer_words(words(), 7)]))
