"""The shape of a decoder-only transformer: one config that covers the published dense and mixed families.

What is built of it is in `models.decoder`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Protocol, override

from jaxinfra.config import NOT_FINGERPRINTED, Problem
from jaxinfra.config.limits import Count, Decay, Natural, Positive
from jaxinfra.models.latent import Latent
from jaxinfra.models.model import ModelConfig
from jaxinfra.models.moe import Experts
from jaxinfra.models.remat import Remat
from jaxinfra.ops.attention import AttentionSpec, Kernel
from jaxinfra.ops.context_cost import ContextMethod
from jaxinfra.ops.rope import Rope

type Sight = Literal["global", "local"]


class Sequences(Protocol):
    """What the model needs to know of the data."""

    @property
    def seq_len(self) -> int:
        """Tokens of a sequence."""
        ...


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(ModelConfig):
    """The shape of a decoder.

    Attributes:
        vocab_size: words.
        layers: blocks.
        width: residual width.
        heads: query heads.
        kv_heads: key/value heads; None is as many as `heads`.
        head_dim: width of a head; None is `width / heads`.
        latent: keys and values come from a small latent (DeepSeek); kv_heads and head_dim are then none.
        mlp_dim: hidden width of the MLP.
        mlp: its kind.
        experts: a mixture of experts in place of every MLP, of its kind; None for none.
        dense_layers: blocks with an MLP that come before those with experts, which `layers` counts (DeepSeek). In a
            pipeline every stage computes them for its own rows, though the first alone needs them.
        norm: kind of the norms.
        norm_eps: added to the variance.
        norm_offset: 1.0 where norm weights are stored as a difference from one (Gemma).
        post_norms: norms after attention and MLP as well as before (Gemma 2).
        qkv_bias: biases on queries, keys and values.
        out_bias: a bias on the output of attention.
        mlp_bias: biases in the MLP.
        qk_norm: RMSNorm on every query and key head (Qwen3, Gemma 3).
        sights: what the layers see, repeated over them: "global", or "local" within `window`.
        window: positions that a local layer sees, itself included.
        softcap: cap on attention scores.
        query_scale: factor on queries; None is `head_dim ** -0.5`.
        rope: rotary positions; None for none.
        local_rope: those of local layers; None is `rope`.
        learned_positions: rows of a learned position embedding; None for none (GPT-2).
        tied: the head is the embedding, transposed.
        scale_embeddings: embeddings times `sqrt(width)` (Gemma).
        logit_softcap: cap on the logits.
        attention: forces an attention kernel; None chooses by platform and shape.
        context_attention: how attention reaches the other shards of a sequence, where mesh.context is above 1: keys and
            values go round a "ring", or every shard will "gather" them; "auto" takes the cheaper.
        dropout: part of the features that are zero, while training, of the embedded words and of what attention and
            MLP add to the stream (Vaswani et al. 2017, section 5.4).
        remat: what is kept of each layer for the backward pass; a tuple is repeated over the layers, in a pipeline
            over those of each chunk.
    """

    modality: ClassVar[str | None] = "token"
    implementation: ClassVar[str | None] = "jaxinfra.models.decoder:Transformer"
    supports_context: ClassVar[bool] = True
    vocab_size: Count
    layers: Count
    width: Count
    heads: Count
    mlp_dim: Count
    kv_heads: Count | None = None
    head_dim: Count | None = None
    latent: Latent | None = None
    mlp: Literal["swiglu", "geglu", "gelu"] = "swiglu"
    experts: Experts | None = None
    dense_layers: Natural = 0
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: Positive = 1e-5
    norm_offset: float = 0.0
    post_norms: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sights: tuple[Sight, ...] = ("global",)
    window: Count | None = None
    softcap: Positive | None = None
    query_scale: float | None = None
    rope: Rope | None = Rope()
    local_rope: Rope | None = None
    learned_positions: Count | None = None
    tied: bool = False
    scale_embeddings: bool = False
    logit_softcap: Positive | None = None
    attention: Annotated[Kernel | None, NOT_FINGERPRINTED] = None
    context_attention: Annotated[ContextMethod | Literal["auto"], NOT_FINGERPRINTED] = "auto"
    dropout: Decay = 0.0
    remat: Annotated[Remat | tuple[Remat, ...], NOT_FINGERPRINTED] = "none"

    @property
    def groups(self) -> int:
        """Key/value heads."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_width(self) -> int:
        """Width of one query or key head."""
        if self.latent is not None:
            return self.latent.head_dim
        return self.width // self.heads if self.head_dim is None else self.head_dim

    @property
    def value_width(self) -> int:
        """Width of one value head."""
        return self.head_width if self.latent is None else self.latent.value_dim

    @property
    def rotary_width(self) -> int:
        """Width of the part of a head that rotary positions may rotate."""
        return self.head_width if self.latent is None else self.latent.rope_dim

    def problems(self) -> Iterable[Problem]:
        """Sizes divide; every option has what it needs."""
        if self.latent is not None:
            yield from self._problems_of_latent()
        elif self.head_dim is None and self.width % self.heads:
            fitting = -(-self.width // (2 * self.heads)) * 2 * self.heads  # rotary positions pair features
            fix = f"use width={fitting} or set head_dim"
            yield Problem(fields=("width", "heads"), message="heads must divide the width", fix=fix)
        if self.heads % self.groups:
            fix = f"use kv_heads={max(g for g in range(1, self.groups + 1) if self.heads % g == 0)}"
            yield Problem(fields=("heads", "kv_heads"), message="kv_heads must divide heads", fix=fix)
        if self.dense_layers and self.experts is None:
            fix = f"use dense_layers=0 layers={self.layers + self.dense_layers}"
            yield Problem(fields=("dense_layers", "experts"), message="without experts all layers are dense", fix=fix)
        if self.experts is not None and self.mlp_bias:
            yield Problem(fields=("mlp_bias", "experts"), message="experts have no biases", fix="use mlp_bias=false")
        if not self.sights:
            yield Problem(fields=("sights",), message="names no layer", fix='use sights=("global",)')
        if "local" in self.sights and self.window is None:
            yield Problem(fields=("sights", "window"), message="local layers need a window", fix="use window=4096")
        if not 0 < len(self.remats) <= self.layers:
            message = f"{len(self.remats)} policies for {self.layers} layers"
            yield Problem(fields=("remat", "layers"), message=message, fix="use remat=full")
        for name in ("rope", "local_rope"):
            rope = getattr(self, name)
            if rope is not None and int(self.rotary_width * rope.fraction) % 2:
                width, odd = "head_dim" if self.latent is None else "latent.rope_dim", self.rotary_width % 2
                yield Problem(
                    fields=(f"{name}.fraction", width),
                    message="the rotated part of a head must be even",
                    fix=f"use {width}={self.rotary_width + 1}" if odd else f"use {name}.fraction=1.0",
                )

    def _problems_of_latent(self) -> Iterable[Problem]:
        """What latent attention has instead is not given as well."""
        for name in ("kv_heads", "head_dim", "qkv_bias", "out_bias", "qk_norm"):
            value = getattr(self, name)
            if value is not None and value is not False:
                without = "none" if value is not True else "false"
                yield Problem(fields=(name, "latent"), message="latent attention has none", fix=f"use {name}={without}")
        if self.rope is None:
            yield Problem(fields=("rope", "latent"), message="latent attention rotates keys", fix="use rope=rope")

    @property
    @override
    def pipeline_layers(self) -> int:
        return self.layers

    @property
    @override
    def uses_dropout(self) -> bool:
        return self.dropout > 0

    @property
    @override
    def sharded_dims(self) -> Mapping[str, tuple[int, str]]:
        latent, experts = self.latent, self.experts
        dim = None if experts is None else experts.dim
        sizes = {
            "latent.kv_rank": (latent and latent.kv_rank, "embed"),
            "latent.q_rank": (latent and latent.q_rank, "embed"),
            "heads": (self.heads, "heads"),
            "kv_heads": (self.groups, "kv_heads"),
            "vocab_size": (self.vocab_size, "vocab"),
            "width": (self.width, "embed"),
            "mlp_dim": (self.mlp_dim if dim is None or self.dense_layers else None, "mlp"),
            "experts.count": (experts and experts.count, "experts"),
            "experts.dim": (dim, "mlp"),
        }
        return {name: (size, axis) for name, (size, axis) in sizes.items() if size is not None}

    def problems_with(self, data: Sequences) -> Iterable[Problem]:
        """Learned positions are as many as a sequence has."""
        if self.learned_positions is not None and self.learned_positions < data.seq_len:
            yield Problem(
                fields=("data.seq_len", "model.learned_positions"),
                message="sequences are longer than the learned positions",
                fix=f"use data.seq_len={self.learned_positions}",
            )

    @override
    def positions(self, data: Sequences) -> int:
        return data.seq_len

    def attention_spec(self, sight: Sight) -> AttentionSpec:
        """What a layer of this sight sees."""
        window, scale, rope = self.window if sight == "local" else None, self.query_scale, self.rope_of(sight)
        stretch = 1.0 if rope is None else rope.score_scale
        if self.latent is not None or stretch != 1:
            # Where latents are decoded, queries are wider than heads, and no width says what their scale is.
            scale = stretch * (self.head_width**-0.5 if scale is None else scale)
        return AttentionSpec(causal=True, window=window, softcap=self.softcap, scale=scale)

    def rope_of(self, sight: Sight) -> Rope | None:
        """The rotary positions of a layer of this sight."""
        return self.local_rope if sight == "local" and self.local_rope is not None else self.rope

    @property
    def depth(self) -> int:
        """Blocks of both kinds."""
        return self.dense_layers + self.layers

    def sight(self, number: int) -> Sight:
        """What the layer of this number, of all from the first dense one on, sees."""
        return self.sights[number % len(self.sights)]

    @property
    def remats(self) -> tuple[Remat, ...]:
        """The remat policies of the layers, repeated over them."""
        return self.remat if isinstance(self.remat, tuple) else (self.remat,)

    @property
    def kinds(self) -> tuple[Sight, ...]:
        """The different sights of the layers, in order."""
        return tuple(dict.fromkeys(self.sight(number) for number in range(self.depth)))
