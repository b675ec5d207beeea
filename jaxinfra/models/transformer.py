"""The config of a decoder-only transformer, for the published dense and mixture-of-experts families.

`models.decoder` has the module. Fields that Hugging Face configs have, too, are named as there.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Protocol, override

from jaxinfra.config import NOT_FINGERPRINTED, Problem
from jaxinfra.config.limits import DecayRate, NonNegativeInt, PositiveFloat, PositiveInt
from jaxinfra.models.latent import MLA
from jaxinfra.models.layers import MlpType, NormType
from jaxinfra.models.model import LayeredModelConfig
from jaxinfra.models.moe import MixtureOfExperts
from jaxinfra.models.remat import Remat
from jaxinfra.ops.attention import AttentionSpec, Kernel
from jaxinfra.ops.context_cost import ContextMethod
from jaxinfra.ops.rope import Rope

type LayerType = Literal["full", "sliding"]


class HasSeqLen(Protocol):
    """A data config with sequences of `seq_len` tokens."""

    seq_len: int


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(LayeredModelConfig):
    """The shape of a decoder.

    Attributes:
        vocab_size: size of the vocabulary.
        num_layers: decoder layers, not counting `num_dense_layers`.
        hidden_size: width of the residual stream.
        num_heads: query heads.
        mlp_dim: hidden width of the MLP.
        num_kv_heads: key/value heads; None is `num_heads`.
        head_dim: width of a head; None is `hidden_size / num_heads`.
        mla: multi-head latent attention (DeepSeek); `num_kv_heads` and `head_dim` must then be None.
        mlp_type: activation and gating of the MLP.
        moe: a mixture of experts in place of every MLP.
        num_dense_layers: layers with an MLP before the `num_layers` with experts (DeepSeek). They are not split over
            pipeline stages: every stage computes them, though only the first needs the result.
        norm_type: RMSNorm or LayerNorm.
        norm_eps: added to the variance.
        norm_offset: 1.0 if norm weights are stored as their difference from one (Gemma).
        post_norms: adds norms after attention and MLP (Gemma 2).
        qkv_bias: biases on queries, keys and values.
        out_bias: a bias on the output of attention.
        mlp_bias: biases in the MLP.
        qk_norm: RMSNorm on every query and key head (Qwen3, Gemma 3).
        layer_types: "full" or "sliding" attention of each layer; repeated if shorter than the layers.
        sliding_window: positions that a query of a sliding layer attends to, its own included.
        attn_softcap: soft cap on attention scores.
        query_scale: factor on queries; None is `head_dim ** -0.5`.
        rope: rotary position embedding.
        sliding_rope: rotary position embedding of sliding layers; None is `rope`.
        learned_positions: rows of a learned position embedding (GPT-2); None has no such embedding.
        tie_embeddings: the LM head is the transposed embedding.
        scale_embeddings: multiplies embeddings by `sqrt(hidden_size)` (Gemma).
        logit_softcap: soft cap on the logits.
        attention_kernel: forces a kernel; None takes the fastest one that can run.
        context_attention: method of attention over sharded sequences (`mesh.context` above 1); "auto" takes the
            cheaper one (see `ops.context_cost`).
        dropout: dropout rate in training, on embeddings and on the outputs of attention and MLP (Vaswani et al. 2017,
            section 5.4).
        remat: what each layer saves for the backward pass (see `models.remat`). A tuple is repeated over the layers; in
            a pipeline, over the layers of each chunk.
    """

    modality: ClassVar[str | None] = "token"
    implementation: ClassVar[str | None] = "jaxinfra.models.decoder:Transformer"
    supports_context: ClassVar[bool] = True
    vocab_size: PositiveInt
    num_layers: PositiveInt
    hidden_size: PositiveInt
    num_heads: PositiveInt
    mlp_dim: PositiveInt
    num_kv_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    mla: MLA | None = None
    mlp_type: MlpType = "swiglu"
    moe: MixtureOfExperts | None = None
    num_dense_layers: NonNegativeInt = 0
    norm_type: NormType = "rmsnorm"
    norm_eps: PositiveFloat = 1e-5
    norm_offset: float = 0.0
    post_norms: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    layer_types: tuple[LayerType, ...] = ("full",)
    sliding_window: PositiveInt | None = None
    attn_softcap: PositiveFloat | None = None
    query_scale: float | None = None
    rope: Rope | None = Rope()
    sliding_rope: Rope | None = None
    learned_positions: PositiveInt | None = None
    tie_embeddings: bool = False
    scale_embeddings: bool = False
    logit_softcap: PositiveFloat | None = None
    attention_kernel: Annotated[Kernel | None, NOT_FINGERPRINTED] = None
    context_attention: Annotated[ContextMethod | Literal["auto"], NOT_FINGERPRINTED] = "auto"
    dropout: DecayRate = 0.0
    remat: Annotated[Remat | tuple[Remat, ...], NOT_FINGERPRINTED] = "none"

    @property
    def kv_head_count(self) -> int:
        """Number of key/value heads, also if `num_kv_heads` is None."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head."""
        if self.mla is not None:
            return self.mla.qk_head_dim
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def v_head_dim(self) -> int:
        """Width of a value head."""
        return self.qk_head_dim if self.mla is None else self.mla.v_head_dim

    @property
    def rope_head_dim(self) -> int:
        """Number of features of a head that rotary positions may rotate."""
        return self.qk_head_dim if self.mla is None else self.mla.qk_rope_head_dim

    def problems(self) -> Iterable[Problem]:
        """Yields sizes that are not divisible, and options that conflict or need another option."""
        if self.mla is not None:
            yield from self._mla_problems()
        elif self.head_dim is None and self.hidden_size % self.num_heads:
            even_heads = 2 * self.num_heads  # rotary positions pair features
            fix = f"use hidden_size={-(-self.hidden_size // even_heads) * even_heads} or set head_dim"
            yield Problem(fields=("hidden_size", "num_heads"), message="num_heads must divide hidden_size", fix=fix)
        if self.num_heads % self.kv_head_count:
            fix = f"use num_kv_heads={max(n for n in range(1, self.kv_head_count + 1) if self.num_heads % n == 0)}"
            yield Problem(fields=("num_heads", "num_kv_heads"), message="num_kv_heads must divide num_heads", fix=fix)
        if self.num_dense_layers and self.moe is None:
            fix = f"use num_dense_layers=0 num_layers={self.num_layers + self.num_dense_layers}"
            yield Problem(fields=("num_dense_layers", "moe"), message="without moe all layers are dense", fix=fix)
        if self.moe is not None and self.mlp_bias:
            yield Problem(fields=("mlp_bias", "moe"), message="experts have no biases", fix="use mlp_bias=false")
        if not self.layer_types:
            yield Problem(fields=("layer_types",), message="is empty", fix='use layer_types=("full",)')
        if "sliding" in self.layer_types and self.sliding_window is None:
            message, fix = "sliding layers need a window", "use sliding_window=4096"
            yield Problem(fields=("layer_types", "sliding_window"), message=message, fix=fix)
        if not 0 < len(self.remat_policies) <= self.num_layers:
            message = f"{len(self.remat_policies)} policies for {self.num_layers} layers"
            yield Problem(fields=("remat", "num_layers"), message=message, fix="use remat=full")
        yield from self._rope_problems()

    def _mla_problems(self) -> Iterable[Problem]:
        for name in ("num_kv_heads", "head_dim", "qkv_bias", "out_bias", "qk_norm"):
            value = getattr(self, name)
            if value is not None and value is not False:
                fix = f"use {name}={'false' if value is True else 'none'}"
                yield Problem(fields=(name, "mla"), message=f"latent attention has no {name}", fix=fix)
        if self.rope is None:
            yield Problem(
                fields=("rope", "mla"), message="latent attention needs rotary positions", fix="use rope=rope"
            )

    def _rope_problems(self) -> Iterable[Problem]:
        for name in ("rope", "sliding_rope"):
            rope = getattr(self, name)
            if rope is not None and int(self.rope_head_dim * rope.fraction) % 2:
                field = "head_dim" if self.mla is None else "mla.qk_rope_head_dim"
                odd = self.rope_head_dim % 2
                yield Problem(
                    fields=(f"{name}.fraction", field),
                    message="the rotated part of a head must be even",
                    fix=f"use {field}={self.rope_head_dim + 1}" if odd else f"use {name}.fraction=1.0",
                )

    @property
    @override
    def sharded_dims(self) -> Mapping[str, tuple[int, str]]:
        mla, moe = self.mla, self.moe
        expert_dim = None if moe is None else moe.expert_dim
        # A size of None: the model has no such dimension.
        dims = {
            "mla.kv_lora_rank": (mla and mla.kv_lora_rank, "embed"),
            "mla.q_lora_rank": (mla and mla.q_lora_rank, "embed"),
            "num_heads": (self.num_heads, "heads"),
            "num_kv_heads": (self.kv_head_count, "kv_heads"),
            "vocab_size": (self.vocab_size, "vocab"),
            "hidden_size": (self.hidden_size, "embed"),
            "mlp_dim": (self.mlp_dim if expert_dim is None or self.num_dense_layers else None, "mlp"),
            "moe.num_experts": (moe and moe.num_experts, "experts"),
            "moe.expert_dim": (expert_dim, "mlp"),
        }
        return {name: (size, axis) for name, (size, axis) in dims.items() if size is not None}

    @override
    def problems_with(self, data: HasSeqLen) -> Iterable[Problem]:
        if self.learned_positions is not None and self.learned_positions < data.seq_len:
            yield Problem(
                fields=("data.seq_len", "model.learned_positions"),
                message="sequences are longer than the learned positions",
                fix=f"use data.seq_len={self.learned_positions}",
            )

    @override
    def positions(self, data: HasSeqLen) -> int:
        return data.seq_len

    def attention_spec(self, layer_type: LayerType) -> AttentionSpec:
        """Returns mask, soft cap and scale of a layer."""
        window = self.sliding_window if layer_type == "sliding" else None
        scale, rope = self.query_scale, self.rope_of(layer_type)
        rope_scale = 1.0 if rope is None else rope.score_scale
        # None would scale by the width of the queries. With MLA, those of a decoding step are wider than a head.
        if self.mla is not None or rope_scale != 1:
            scale = rope_scale * (self.qk_head_dim**-0.5 if scale is None else scale)
        return AttentionSpec(causal=True, window=window, softcap=self.attn_softcap, scale=scale)

    def rope_of(self, layer_type: LayerType) -> Rope | None:
        """Returns the rotary positions of a layer."""
        return self.sliding_rope if layer_type == "sliding" and self.sliding_rope is not None else self.rope

    @property
    def total_layers(self) -> int:
        """Number of layers: `num_dense_layers + num_layers`."""
        return self.num_dense_layers + self.num_layers

    def layer_type(self, layer: int) -> LayerType:
        """Returns the type of a layer; indices start at the first dense layer."""
        return self.layer_types[layer % len(self.layer_types)]

    @property
    def remat_policies(self) -> tuple[Remat, ...]:
        """The policies that are repeated over the layers."""
        return self.remat if isinstance(self.remat, tuple) else (self.remat,)

    @property
    def distinct_layer_types(self) -> tuple[LayerType, ...]:
        """The layer types in use, in order of their first layer."""
        return tuple(dict.fromkeys(self.layer_type(layer) for layer in range(self.total_layers)))
