"""Rotary position embedding (Su et al. 2021), with partial rotation and frequency scaling for longer contexts.

Feature i of the first half of the rotated part is paired with feature i of the second, as in published Llama weights.

Shape suffixes: B batch, T length, H heads, K head dim.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge

from jaxinfra.config import Problem
from jaxinfra.config.limits import PositiveFloat, PositiveFraction, PositiveInt


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Divides all frequencies by the same number (position interpolation, Chen et al. 2023).

    Attributes:
        factor: the number.
    """

    factor: PositiveFloat = 8.0

    def scale(self, freqs: np.ndarray, theta: float) -> np.ndarray:
        """Returns the scaled frequencies."""
        return freqs / self.factor


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Divides low frequencies by `factor` and keeps high ones, with a ramp between (Llama 3.1's published config).

    Attributes:
        factor: divisor of frequencies whose wavelength is above `original_length / low_freq_factor`.
        low_freq_factor: see `factor`.
        high_freq_factor: frequencies with a wavelength below `original_length / high_freq_factor` are kept. Without a
            ramp it is equal to `low_freq_factor` (Llama 4 Scout).
        original_length: context length before scaling, in tokens.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192

    def scale(self, freqs: np.ndarray, theta: float) -> np.ndarray:
        """Returns the scaled frequencies."""
        turns = self.original_length * freqs / (2 * math.pi)  # of each pair, within the original length
        ramp = max(self.high_freq_factor - self.low_freq_factor, 1e-9)  # the bound avoids a division by zero
        keep = np.clip((turns - self.low_freq_factor) / ramp, 0, 1)
        return freqs * (keep + (1 - keep) / self.factor)


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN (Peng et al. 2023), as DeepSeek-V2 and V3 publish it.

    Feature pairs that turn at least `beta_fast` times within the original length keep their frequency. The frequency of
    pairs that turn at most `beta_slow` times is divided by `factor`, with a ramp between. Attention scores are
    multiplied by `m(mscale_all_dim) ** 2`, and cosines and sines by `m(mscale) / m(mscale_all_dim)`, with
    `m(w) = 1 + 0.1 w ln(factor)`.

    Attributes:
        factor: new context length over the original one.
        original_length: context length before scaling, in tokens.
        beta_fast: smallest number of turns with an unchanged frequency.
        beta_slow: largest number of turns with a fully divided frequency.
        mscale: w for rotated features.
        mscale_all_dim: w for scores, rotated features or not.
        truncate: whether the ramp begins and ends at whole numbers of pairs; GPT-OSS has no such rounding.
    """

    factor: Annotated[float, Ge(1)] = 40.0
    original_length: PositiveInt = 4096
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    truncate: bool = True

    def problems(self) -> Iterable[Problem]:
        """Yields a problem if `beta_slow` is larger than `beta_fast`; Kimi K2 has equal ones."""
        if self.beta_slow > self.beta_fast:
            fix = "use beta_slow=1.0 beta_fast=32.0"
            yield Problem(fields=("beta_slow", "beta_fast"), message="beta_fast must not be smaller", fix=fix)

    def m(self, weight: float) -> float:
        """Returns the factor `m(weight)`."""
        return 1 + 0.1 * weight * math.log(self.factor)

    def scale(self, freqs: np.ndarray, theta: float) -> np.ndarray:
        """Returns the scaled frequencies; `theta` is their base."""
        pairs = len(freqs)

        def pair_with(turns: float) -> float:
            """Returns the index, not rounded, of the pair that turns this often: pair i has `theta ** (-i / pairs)`."""
            return pairs * math.log(self.original_length / (2 * math.pi * turns)) / math.log(theta)

        first, last = pair_with(self.beta_fast), pair_with(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * pairs - 1)  # bounds as published, 1e-3 against a division by zero
        divide = np.clip((np.arange(pairs) - first) / max(last - first, 1e-3), 0, 1)
        return freqs * (1 - divide + divide / self.factor)


@dataclass(frozen=True, kw_only=True)
class LongRopeScaling:
    """LongRoPE (Ding et al. 2024), as Phi-3 and Phi-4 publish it: a divisor for each frequency.

    Documents longer than the original length have other divisors than shorter ones, at all of their positions. Cosines
    and sines of both are multiplied by `sqrt(1 + ln(factor) / ln(original_length))`.

    Attributes:
        divisors: a divisor for each pair of rotated features: the published "long_factor".
        short_divisors: those of documents up to the original length: the published "short_factor". With () they have
            `divisors`, too.
        factor: new context length over the original one; 1 does not multiply.
        original_length: context length before scaling, in tokens.
    """

    divisors: tuple[float, ...]
    short_divisors: tuple[float, ...] = ()
    factor: Annotated[float, Ge(1)] = 32.0
    original_length: Annotated[int, Ge(2)] = 4096

    def problems(self) -> Iterable[Problem]:
        """Yields divisors that are not positive, finite numbers, and short ones that are equal or too few."""
        for field in ("divisors", "short_divisors"):
            if not all(0 < divisor < math.inf for divisor in getattr(self, field)):
                yield Problem(fields=(field,), message="must be positive, finite numbers", fix="use scaling=none")
        if (short := self.short_divisors) and (short == self.divisors or len(short) != len(self.divisors)):
            message = f"must be {len(self.divisors)} numbers that differ from divisors"
            yield Problem(fields=("short_divisors",), message=message, fix="use short_divisors=()")

    def scale(self, freqs: np.ndarray, theta: float) -> np.ndarray:
        """Returns the scaled frequencies."""
        return freqs / np.asarray(self.divisors)


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions.

    Attributes:
        theta: base of the frequencies.
        fraction: rotated fraction of each head.
        scaling: frequency scaling, for contexts longer than in pretraining.
        proportional: a `fraction` of the pairs of the whole head is rotated, with the frequencies that they have when
            all are, instead of all pairs of a part of the head (Gemma 4).
    """

    theta: PositiveFloat = 10000.0
    fraction: PositiveFraction = 1.0
    scaling: LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling | None = None
    proportional: bool = False

    def problems(self) -> Iterable[Problem]:
        """Yields a base of YaRN with which frequencies would not fall from feature to feature."""
        if isinstance(self.scaling, YarnScaling) and self.theta <= 1:
            yield Problem(fields=("theta", "scaling"), message="theta must be above 1", fix="use theta=10000.0")
        if self.proportional and self.scaling is not None:
            message, fix = "proportional frequencies are not scaled", "use scaling=none"
            yield Problem(fields=("proportional", "scaling"), message=message, fix=fix)

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Returns the radians per position of each pair, float64 `[rotated / 2]`.

        `rotated` is `fraction * head_dim`; with `proportional` it is `head_dim`, and the last pairs have zeros.
        """
        rotated = head_dim if self.proportional else int(head_dim * self.fraction)
        freqs = self.theta ** -(np.arange(0, rotated, 2) / rotated)
        if self.proportional:
            freqs[int(head_dim * self.fraction) // 2 :] = 0
        return freqs if self.scaling is None else self.scaling.scale(freqs, self.theta)

    @property
    def short_length(self) -> int | None:
        """The longest document that has the frequencies of `short`; None if all documents have the same."""
        s = self.scaling
        return s.original_length if isinstance(s, LongRopeScaling) and s.short_divisors else None

    @property
    def short(self) -> "Rope":
        """The rotary positions of documents up to `short_length`."""
        s = self.scaling
        assert isinstance(s, LongRopeScaling)
        return replace(self, scaling=replace(s, divisors=s.short_divisors, short_divisors=()))

    @property
    def score_scale(self) -> float:
        """Factor on attention scores, besides the factor on cosines and sines."""
        s = self.scaling
        return s.m(s.mscale_all_dim) ** 2 if isinstance(s, YarnScaling) else 1.0

    @property
    def table_scale(self) -> float:
        """Factor on cosines and sines."""
        s = self.scaling
        if isinstance(s, LongRopeScaling):
            return math.sqrt(1 + math.log(s.factor) / math.log(s.original_length))
        return s.m(s.mscale) / s.m(s.mscale_all_dim) if isinstance(s, YarnScaling) else 1.0


def rope_tables(
    rope: Rope, positions_BT: jax.Array, head_dim: int, dtype: jnp.dtype, is_long_BT: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns cosines and sines of all angles, each `[B, T, 1, rotated / 2]`; B is 1 if rows share positions.

    `is_long_BT`, with the same dimensions, says which tokens are of documents longer than `rope.short_length`.
    """
    freqs = jnp.asarray(rope.frequencies(head_dim), jnp.float32)
    if is_long_BT is not None:
        short = jnp.asarray(rope.short.frequencies(head_dim), jnp.float32)
        freqs = jnp.where(is_long_BT[..., None, None], freqs, short)
    angles = positions_BT.astype(jnp.float32)[..., None, None] * freqs
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if rope.table_scale != 1:
        cos, sin = cos * rope.table_scale, sin * rope.table_scale
    return cos.astype(dtype), sin.astype(dtype)


def in_long_documents(positions_BT: jax.Array, segments_BT: jax.Array, length: int) -> jax.Array:
    """Returns whether each token is of a document that has a position of `length` or above, bool `[B, T]`.

    The tokens of a document are neighbors, with positions that grow; T is not sharded.
    """
    size = segments_BT.shape[1]
    is_last_BT = jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    # The last token of a document has the largest position. Each token finds it as the smallest index of a last token
    # from its own place on; the lowest bit carries the answer along.
    coded_BT = 2 * jnp.arange(size) + (positions_BT >= length)
    return jax.lax.cummin(jnp.where(is_last_BT, coded_BT, 2 * size), axis=1, reverse=True) % 2 == 1


def rotate(x_BTHK: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the first `2 * cos.shape[-1]` features of every head and keeps the others."""
    half = cos.shape[-1]
    first, second = x_BTHK[..., :half], x_BTHK[..., half : 2 * half]
    parts = [first * cos - second * sin, second * cos + first * sin]
    if 2 * half < x_BTHK.shape[-1]:
        parts.append(x_BTHK[..., 2 * half :])
    return jnp.concatenate(parts, axis=-1).astype(x_BTHK.dtype)
