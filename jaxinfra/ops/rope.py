"""Rotary position embedding (Su et al. 2021), with partial rotation and stretched frequencies.

The two halves of the rotated part form the pairs (the convention of published Llama-like weights).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfra.config import Problem


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """All frequencies divided by `factor` (position interpolation, Chen et al. 2023)."""

    factor: float = 8.0


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Slow frequencies divided by `factor`, fast ones kept, a ramp between (Llama 3.1's published config).

    Attributes:
        factor: divisor of frequencies whose wavelength is above `original_length / low_freq_factor`.
        low_freq_factor: see `factor`.
        high_freq_factor: frequencies of wavelength below `original_length / high_freq_factor` are kept.
        original_length: the context length, in tokens, before stretching.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions.

    Attributes:
        theta: base of the geometric frequencies.
        fraction: the part of each head that is rotated.
        scaling: how frequencies are stretched for contexts longer than those first trained on.
    """

    theta: float = 10000.0
    fraction: float = 1.0
    scaling: LinearScaling | Llama3Scaling | None = None

    def problems(self) -> Iterable[Problem]:
        """The base is positive and the fraction is one."""
        if self.theta <= 0:
            yield Problem(fields=("theta",), message="must be positive", fix="use theta=10000.0")
        if not 0 < self.fraction <= 1:
            yield Problem(fields=("fraction",), message="must be above 0 and at most 1", fix="use fraction=1.0")

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Radians a position, float64 `[rotated / 2]`, where `rotated = fraction * head_dim`."""
        rotated = int(head_dim * self.fraction)
        freqs = self.theta ** -(np.arange(0, rotated, 2) / rotated)
        if isinstance(self.scaling, LinearScaling):
            return freqs / self.scaling.factor
        if isinstance(self.scaling, Llama3Scaling):
            s = self.scaling
            turns = s.original_length * freqs / (2 * math.pi)
            keep = np.clip((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0, 1)
            return freqs * (keep + (1 - keep) / s.factor)
        return freqs


def rope_tables(rope: Rope, positions_BT: jax.Array, head_dim: int, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of every angle, each `[B, T, 1, rotated / 2]` (`B` is 1 where rows share positions)."""
    freqs = jnp.asarray(rope.frequencies(head_dim), jnp.float32)
    angles = positions_BT.astype(jnp.float32)[..., None, None] * freqs
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def rotate(x_BTHK: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the leading `2 * cos.shape[-1]` features of every head; the rest pass through."""
    half = cos.shape[-1]
    first, second = x_BTHK[..., :half], x_BTHK[..., half : 2 * half]
    parts = [first * cos - second * sin, second * cos + first * sin]
    if 2 * half < x_BTHK.shape[-1]:
        parts.append(x_BTHK[..., 2 * half :])
    return jnp.concatenate(parts, axis=-1).astype(x_BTHK.dtype)
