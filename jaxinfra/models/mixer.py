"""Defines the interface of mixers: a mixer is the part of a layer that moves information between positions.

A layer of a `TransformerConfig` names the config of its mixer, such as `attention.Attention`, which builds the module.

Shape suffixes: B batch, T length, D residual width.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax

from jaxinfra.config import Extensible, Problem
from jaxinfra.models.layers import NormConfig, ParamFactory
from jaxinfra.ops.attention import AttentionSpec, Kernel
from jaxinfra.ops.context_cost import ContextMethod
from jaxinfra.ops.rope import LongRopeScaling, Rope


class TokenInfo(NamedTuple):
    """Positions and documents of the tokens that a layer processes.

    Attributes:
        positions: positions in the documents, `[B or 1, T]`; None for a mixer that does not use them.
        rope: cosines and sines of the positions, `[B or 1, T, 1, rotated / 2]`; None without rotary positions.
        segments: document ids `[B, T]`; None if every row is one document.
        start: the cache slot of each row's first token, int32 `[B]`; None without a cache.
        counts: with a cache, the number of tokens of each row, int32 `[B]`; those after them are padding.
        dropout_bits: random bits `[B, T]` (see `ops.dropout`); None drops nothing.
    """

    positions: jax.Array | None = None
    rope: tuple[jax.Array, jax.Array] | None = None
    segments: jax.Array | None = None
    start: jax.Array | None = None
    counts: jax.Array | None = None
    dropout_bits: jax.Array | None = None


@dataclass(frozen=True, kw_only=True)
class MixerOptions:
    """Options that a mixer takes from the model around it.

    Attributes:
        hidden_size: width of the residual stream.
        norm: the norms of the model.
        out_scale: factor on the initial weights of the output projection.
        causal: whether a position sees no later one.
        kernel: forces a kernel of attention; None takes the fastest one that can run.
        context_method: method of attention over sharded sequences (see `ops.context_cost`).
    """

    hidden_size: int
    norm: NormConfig
    out_scale: float
    causal: bool = True
    kernel: Kernel | None = None
    context_method: ContextMethod | Literal["auto"] = "auto"


class HeadSizes(NamedTuple):
    """The heads of an attention layer and their widths."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int


class Mixer(Extensible, ABC):
    """The config of a mixer: a frozen dataclass that inherits from this class, and defines what is abstract here.

    Arguments `hidden_size` are the width of the residual stream.
    """

    builtins: ClassVar[tuple[str, ...]] = (
        "jaxinfra.models.attention:Attention",
        "jaxinfra.models.latent:LatentAttention",
        "jaxinfra.models.delta_net:GatedDeltaNet",
    )

    @abstractmethod
    def build(self, options: MixerOptions, params: ParamFactory) -> Any:
        """Returns the module: `(x, tokens, cache) -> (y, cache)`, with `empty_cache(layers, batch, length)`.

        `x` and `y` are `[B, T, D]`, sharded as ("batch", "positions", None). With `mesh.context` above 1 the positions
        of a sequence are on several devices, in shard order (see `parallel.context`). `cache` is None in training, and
        in decoding what the layer knows of earlier tokens: `empty_cache` returns arrays `[layers, B, ...]`, of which
        each call gets and returns those of its layer.
        """

    @abstractmethod
    def matmul_params(self, hidden_size: int) -> int:
        """Counts the weights in a token's matmuls."""

    def sharded_dims(self) -> Mapping[str, tuple[int, str]]:
        """Returns sizes and logical axes by field, as `ModelConfig.sharded_dims`."""
        return {}

    def problems_in_model(self, hidden_size: int, prefix: str) -> Iterable[Problem]:
        """Yields conflicts with the model; `prefix` comes before the names of the mixer's own fields."""
        return ()

    def rotary(self, hidden_size: int) -> tuple[Rope, int] | None:
        """Returns the rotary positions and the number of features of a head that they may rotate."""
        return None

    def attention(self, hidden_size: int) -> tuple[AttentionSpec, HeadSizes] | None:
        """Returns the mask and scale of attention, and its heads; None for a mixer that is no attention."""
        return None

    def pair_features(self, hidden_size: int, length: int) -> float:
        """Counts the multiplications of a token in attention, for `models.flops`.

        Each visible key takes one for each feature of a query, and one for each feature of an output. A mixer without
        attention counts the multiplications with its state.
        """
        attention = self.attention(hidden_size)
        if attention is None:
            return 0
        _, heads = attention
        return heads.num_heads * (heads.head_dim + heads.value_dim) * self.visible_keys(hidden_size, length)

    def visible_keys(self, hidden_size: int, length: int) -> float:
        """Returns the mean number of keys that a query attends to in a sequence of this length."""
        attention = self.attention(hidden_size)
        return 0 if attention is None else visible_keys(length, attention[0].window)


def visible_keys(length: int, window: int | None) -> float:
    """Returns the mean number of keys that a query attends to, in a causal sequence with an optional window."""
    window = length if window is None else min(window, length)
    # The first `window` queries attend to 1, 2, ..., window keys, all others to `window`.
    return (window * (window + 1) / 2 + (length - window) * window) / length


def rope_problems(rope: Rope | None, head_dim: int, prefix: str, field: str) -> Iterable[Problem]:
    """Yields an odd number of features to rotate in pairs, and another number of LongRoPE divisors than of pairs.

    `field` is the field that has the width of a head, and `prefix` comes before the names of the fields.
    """
    if rope is not None and int(head_dim * rope.fraction) % 2:
        fix = f"{prefix}{field}={head_dim + 1}" if head_dim % 2 else f"{prefix}rope.fraction=1.0"
        message = "the rotated part of a head must be even"
        yield Problem(fields=(f"{prefix}rope.fraction", f"{prefix}{field}"), message=message, fix=f"use {fix}")
    elif rope is not None and isinstance(rope.scaling, LongRopeScaling):
        pairs, found = int(head_dim * rope.fraction) // 2, len(rope.scaling.divisors)
        if pairs != found:
            fields = (f"{prefix}rope.scaling.divisors", f"{prefix}{field}")
            message, fix = f"{found} divisors for {pairs} pairs of features", f"use {prefix}{field}={2 * found}"
            yield Problem(fields=fields, message=message, fix=fix)
