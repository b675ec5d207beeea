"""Rotary position embedding (Su et al. 2021), with partial rotation and stretched frequencies.

The two halves of the rotated part form the pairs (the convention of published Llama-like weights).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge

from jaxinfra.config import Problem
from jaxinfra.config.limits import Count, Positive, PositiveShare


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
class YarnScaling:
    """YaRN (Peng et al. 2023), as DeepSeek-V2 and V3 publish it.

    Of pairs of features, those that turn often within the original length keep their frequency, those that hardly turn
    have it divided by `factor`, with a ramp over the pairs between. Scores grow with the length: `m(w) = 1 + 0.1 w
    ln(factor)` is put on them, squared.

    Attributes:
        factor: by how much contexts are longer.
        original_length: the context length, in tokens, before stretching.
        beta_fast: turns within the original length from which on a frequency is kept.
        beta_slow: turns up to which it is divided.
        mscale: the w of rotated features, as far as it is not that of all.
        mscale_all_dim: the w of whole scores, of features that are not rotated too.
    """

    factor: Annotated[float, Ge(1)] = 40.0
    original_length: Count = 4096
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def problems(self) -> Iterable[Problem]:
        """The ramp has two ends."""
        if self.beta_slow >= self.beta_fast:
            fix = "use beta_slow=1.0 beta_fast=32.0"
            yield Problem(fields=("beta_slow", "beta_fast"), message="the fast one must be larger", fix=fix)

    def growth(self, weight: float) -> float:
        """`m(weight)`."""
        return 1 + 0.1 * weight * math.log(self.factor)

    def stretched(self, freqs: np.ndarray, theta: float) -> np.ndarray:
        """The frequencies `[pairs]` of this base, stretched."""
        pairs = len(freqs)

        def pair(turns: float) -> float:
            """The pair that turns so often within the original length, as a real number."""
            return pairs * math.log(self.original_length / (2 * math.pi * turns)) / math.log(theta)

        first = max(math.floor(pair(self.beta_fast)), 0)
        last = min(math.ceil(pair(self.beta_slow)), 2 * pairs - 1)
        slow = np.clip((np.arange(pairs) - first) / max(last - first, 1e-3), 0, 1)
        return freqs * (1 - slow + slow / self.factor)


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions.

    Attributes:
        theta: base of the geometric frequencies.
        fraction: the part of each head that is rotated.
        scaling: how frequencies are stretched for contexts longer than those first trained on.
    """

    theta: Positive = 10000.0
    fraction: PositiveShare = 1.0
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None

    def problems(self) -> Iterable[Problem]:
        """A base of 1 turns all features alike, which leaves nothing to stretch."""
        if isinstance(self.scaling, YarnScaling) and self.theta <= 1:
            yield Problem(fields=("theta", "scaling"), message="theta must be above 1", fix="use theta=10000.0")

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Radians a position, float64 `[rotated / 2]`, where `rotated = fraction * head_dim`."""
        rotated = int(head_dim * self.fraction)
        freqs = self.theta ** -(np.arange(0, rotated, 2) / rotated)
        match self.scaling:
            case None:
                return freqs
            case LinearScaling(factor=factor):
                return freqs / factor
            case Llama3Scaling(low_freq_factor=low, high_freq_factor=high) as s:
                keep = np.clip((s.original_length * freqs / (2 * math.pi) - low) / (high - low), 0, 1)
                return freqs * (keep + (1 - keep) / s.factor)
            case YarnScaling() as s:
                return s.stretched(freqs, self.theta)

    @property
    def score_scale(self) -> float:
        """Factor on attention scores, besides that of the tables."""
        return self.scaling.growth(self.scaling.mscale_all_dim) ** 2 if isinstance(self.scaling, YarnScaling) else 1.0

    @property
    def table_scale(self) -> float:
        """Factor on cosines and sines."""
        s = self.scaling
        return s.growth(s.mscale) / s.growth(s.mscale_all_dim) if isinstance(s, YarnScaling) else 1.0


def rope_tables(rope: Rope, positions_BT: jax.Array, head_dim: int, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of every angle, each `[B, T, 1, rotated / 2]` (`B` is 1 where rows share positions)."""
    freqs = jnp.asarray(rope.frequencies(head_dim), jnp.float32)
    angles = positions_BT.astype(jnp.float32)[..., None, None] * freqs
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if rope.table_scale != 1:
        cos, sin = cos * rope.table_scale, sin * rope.table_scale
    return cos.astype(dtype), sin.astype(dtype)


def rotate(x_BTHK: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the leading `2 * cos.shape[-1]` features of every head; the rest pass through."""
    half = cos.shape[-1]
    first, second = x_BTHK[..., :half], x_BTHK[..., half : 2 * half]
    parts = [first * cos - second * sin, second * cos + first * sin]
    if 2 * half < x_BTHK.shape[-1]:
        parts.append(x_BTHK[..., 2 * half :])
    return jnp.concatenate(parts, axis=-1).astype(x_BTHK.dtype)
