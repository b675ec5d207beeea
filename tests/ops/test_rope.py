"""Rotary frequencies, tables and rotation."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra.config import validate
from jaxinfra.ops.rope import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    YarnScaling,
    in_long_documents,
    rope_tables,
    rotate,
)
from tests.refusals import problem


def test_frequencies_are_geometric() -> None:
    assert Rope(theta=10000.0).frequencies(8) == pytest.approx([1.0, 0.1, 0.01, 0.001])
    assert Rope(theta=10000.0, fraction=0.5).frequencies(8) == pytest.approx([1.0, 0.01])
    assert Rope(theta=16.0, scaling=LinearScaling(factor=4.0)).frequencies(4) == pytest.approx([1 / 4, 1 / 16])


def test_llama3_scaling_keeps_high_and_divides_low_frequencies() -> None:
    """The numbers of Llama 3.1 8B: heads of 128, theta of 500,000, 8,192 tokens before scaling."""
    plain = Rope(theta=500000.0).frequencies(128)
    scaled = Rope(theta=500000.0, scaling=Llama3Scaling()).frequencies(128)
    wavelength = 2 * math.pi / plain
    fast, slow = wavelength < 8192 / 4, wavelength > 8192
    assert np.array_equal(scaled[fast], plain[fast]) and fast.sum() == 29
    assert scaled[slow] == pytest.approx(plain[slow] / 8) and slow.sum() == 29
    between = scaled[~fast & ~slow] / plain[~fast & ~slow]
    assert np.all(np.diff(between) < 0) and between.min() > 1 / 8 and between.max() < 1


def test_scaling_without_a_ramp_keeps_or_divides_each_frequency() -> None:
    """Llama 4 Scout has equal factors, Kimi K2 equal betas."""
    plain = Rope(theta=500000.0).frequencies(128)
    scaled = Rope(theta=500000.0, scaling=Llama3Scaling(factor=16.0, high_freq_factor=1.0)).frequencies(128)
    assert np.array_equal(plain / scaled, np.where(2 * math.pi / plain < 8192, 1.0, 16.0))
    kimi = Rope(theta=50000.0, scaling=YarnScaling(factor=32.0, beta_fast=1.0))
    validate(kimi)
    divided = Rope(theta=50000.0).frequencies(64) / kimi.frequencies(64)
    assert divided[:20] == pytest.approx([1.0] * 20) and divided[20:] == pytest.approx([32.0] * 12)


@pytest.mark.parametrize("rope", [Rope(), Rope(fraction=0.5), Rope(theta=100.0)])
def test_rotate_turns_pairs_by_their_angle(rope: Rope) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, 8)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 1000], [0, 0, 7, 8, 9]], np.int32)
    cos, sin = rope_tables(rope, jnp.asarray(positions), 8, jnp.dtype("float32"))
    actual = np.asarray(rotate(jnp.asarray(x), cos, sin))
    half = int(8 * rope.fraction) // 2
    z = (x[..., :half] + 1j * x[..., half : 2 * half]) * np.exp(1j * positions[..., None, None] * rope.frequencies(8))
    # An angle of 1,000 radians in float32 is known to 6e-5.
    np.testing.assert_allclose(actual[..., :half], z.real, atol=2e-4)
    np.testing.assert_allclose(actual[..., half : 2 * half], z.imag, atol=2e-4)
    assert np.array_equal(actual[..., 2 * half :], x[..., 2 * half :])


def test_scores_depend_on_the_distance_only() -> None:
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 64)), jnp.float32) for _ in range(2))

    def score(q_at: int, k_at: int) -> float:
        turned = (
            rotate(x, *rope_tables(Rope(), jnp.full((1, 1), at), 64, jnp.dtype("float32")))
            for x, at in ((q, q_at), (k, k_at))
        )
        return float(jnp.vdot(*turned))

    assert score(7, 3) == pytest.approx(score(107, 103), abs=1e-3)
    assert score(7, 3) != pytest.approx(score(8, 3), abs=1e-2)


@pytest.mark.parametrize(
    ("rope", "field"),
    [
        (Rope(theta=0.0), "theta"),
        (Rope(fraction=1.5), "fraction"),
        (Rope(theta=1.0, scaling=YarnScaling()), "theta"),
        (Rope(scaling=YarnScaling(factor=0.5)), "factor"),
        (Rope(scaling=YarnScaling(beta_slow=40.0)), "beta_slow=40.0, scaling.beta_fast"),
        (Rope(scaling=LongRopeScaling(divisors=(1.0, 2.0), short_divisors=(1.0,))), "short_divisors"),
        (Rope(scaling=LongRopeScaling(divisors=(1.0,), short_divisors=(1.0,))), "short_divisors"),
    ],
)
def test_invalid_configs(rope: Rope, field: str) -> None:
    problem(rope, field)


def test_yarn_agrees_with_deepseek_v3() -> None:
    """64 features and a factor of 40: pairs up to 10 are kept, from 23 on divided; scores grow by 1.369 ** 2."""
    plain = Rope().frequencies(64)
    rope = Rope(scaling=YarnScaling(mscale_all_dim=1.0))
    kept = plain / rope.frequencies(64)
    assert np.array_equal(kept[:11], np.ones(11)) and kept[23:] == pytest.approx([40.0] * 9)
    assert 1 / kept[11:23] == pytest.approx([1 - n / 13 * 39 / 40 for n in range(1, 13)])
    assert rope.score_scale == pytest.approx((0.1 * math.log(40) + 1) ** 2) and rope.table_scale == 1.0


def test_yarn_scales_rotated_features() -> None:
    rope = Rope(scaling=YarnScaling(factor=8.0))
    assert rope.score_scale == 1.0 and rope.table_scale == pytest.approx(0.1 * math.log(8) + 1)
    cos, sin = rope_tables(rope, jnp.array([[0, 3]]), 8, jnp.dtype("float32"))
    assert np.asarray(cos**2 + sin**2) == pytest.approx(np.full(cos.shape, rope.table_scale**2), rel=1e-6)


def test_all_tokens_of_a_long_document_are_in_one() -> None:
    rng = np.random.default_rng(2)
    for length in (1, 3, 5):
        lengths = [rng.multinomial(24, [0.2] * 5) for _ in range(6)]
        segments = np.stack([np.repeat([7, 2, 0, 1, 9], row) for row in lengths])
        positions = np.stack([np.concatenate([np.arange(count) for count in row]) for row in lengths])
        expected = np.stack([np.repeat(row > length, row) for row in lengths])
        found = in_long_documents(jnp.asarray(positions), jnp.asarray(segments), length)
        assert np.array_equal(found, expected) and expected.any()
