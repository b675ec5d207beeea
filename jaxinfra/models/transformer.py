"""The config of a decoder-only transformer: a pattern of layers, for the published dense and expert families.

`models.decoder` has the module. Fields that Hugging Face configs have, too, are named as there.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Protocol, Self, override

from jaxinfra.config import NOT_FINGERPRINTED, Problem
from jaxinfra.config.limits import DecayRate, PositiveFloat, PositiveInt
from jaxinfra.config.overrides import apply
from jaxinfra.models.layers import FeedForward, NormConfig
from jaxinfra.models.mixer import Mixer
from jaxinfra.models.model import LayeredModelConfig
from jaxinfra.models.moe import MixtureOfExperts
from jaxinfra.models.remat import Remat
from jaxinfra.ops.attention import Kernel
from jaxinfra.ops.context_cost import ContextMethod


class HasSeqLen(Protocol):
    """A data config with sequences of `seq_len` tokens."""

    seq_len: int


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer of a decoder: a mixer and an MLP, whose outputs are added to the residual stream.

    Attributes:
        mixer: moves information between positions.
        mlp: an MLP, or a mixture of experts in its place.
        norms: where the norms are: "before" mixer and MLP (Llama), "after" them (OLMo 2), or "both" (Gemma 2).
        output_scale: the residual stream after the layer is multiplied by a number, which is not trained (Gemma 4).
    """

    mixer: Mixer
    mlp: FeedForward
    norms: Literal["before", "after", "both"] = "before"
    output_scale: bool = False


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Periods of layers whose parameters are stacked: those of one position in the period are `[times, ...]`.

    Attributes:
        layers: the layers of a period.
        times: number of periods.
        first: index of the first layer in the model.
    """

    layers: tuple[Layer, ...]
    times: int
    first: int


@dataclass(frozen=True, kw_only=True)
class MultiTokenPrediction:
    """Modules that predict tokens beyond the next one, in training only (DeepSeek-AI 2024, "DeepSeek-V3", section 2.2).

    Attributes:
        layer: the layer of each module.
        depths: number of modules; the last one predicts the token `depths` after the next one.
    """

    layer: Layer
    depths: PositiveInt = 1


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(LayeredModelConfig):
    """The shape of a decoder.

    Attributes:
        vocab_size: size of the vocabulary.
        hidden_size: width of the residual stream.
        num_layers: number of layers, the first ones included.
        layers: the period: layers that are repeated until there are `num_layers`. The last repetition may be cut short.
            An override without an index, such as `model.layers.mlp.dim=128`, sets all layers that have the field.
        first_layers: layers before the first period, without experts (DeepSeek). They are not split over pipeline
            stages: every stage computes them, though only the first needs the result.
        norm: the norms of all layers, and the last one.
        learned_positions: rows of a learned position embedding (GPT-2); None has no such embedding.
        tie_embeddings: the LM head is the transposed embedding.
        scale_embeddings: multiplies embeddings by `sqrt(hidden_size)` (Gemma).
        embedding_multiplier: another factor on embeddings (Granite).
        residual_multiplier: factor on what a mixer or an MLP adds to the residual stream (Granite).
        logits_scaling: divisor of the logits (Granite).
        logit_softcap: soft cap on the logits.
        attention_kernel: forces a kernel; None takes the fastest one that can run.
        context_attention: method of attention over sharded sequences (`mesh.context` above 1); "auto" takes the
            cheaper one (see `ops.context_cost`).
        dropout: dropout rate in training, on embeddings and on the outputs of mixer and MLP (Vaswani et al. 2017,
            section 5.4).
        remat: what each layer saves for the backward pass (see `models.remat`). A tuple is repeated over the layers; in
            a pipeline, over the layers of each chunk.
        mtp: modules for multi-token prediction, which `CausalLM` trains; they share the embedding and the LM head.
            Sampling and evaluation do not compute them.
    """

    modality: ClassVar[str | None] = "token"
    implementation: ClassVar[str | None] = "jaxinfra.models.decoder:Transformer"
    supports_context: ClassVar[bool] = True
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    num_layers: PositiveInt
    layers: tuple[Layer, ...]
    first_layers: tuple[Layer, ...] = ()
    norm: NormConfig = NormConfig()
    learned_positions: PositiveInt | None = None
    tie_embeddings: bool = False
    scale_embeddings: bool = False
    embedding_multiplier: PositiveFloat = 1.0
    residual_multiplier: PositiveFloat = 1.0
    logits_scaling: PositiveFloat = 1.0
    logit_softcap: PositiveFloat | None = None
    attention_kernel: Annotated[Kernel | None, NOT_FINGERPRINTED] = None
    context_attention: Annotated[ContextMethod | Literal["auto"], NOT_FINGERPRINTED] = "auto"
    dropout: DecayRate = 0.0
    remat: Annotated[Remat | tuple[Remat, ...], NOT_FINGERPRINTED] = "none"
    mtp: MultiTokenPrediction | None = None

    def layer(self, index: int) -> Layer:
        """Returns the config of a layer."""
        after_first = index - len(self.first_layers)
        return self.first_layers[index] if after_first < 0 else self.layers[after_first % len(self.layers)]

    @property
    def all_layers(self) -> tuple[Layer, ...]:
        """The configs of all layers."""
        return tuple(map(self.layer, range(self.num_layers)))

    @property
    def training_layers(self) -> tuple[Layer, ...]:
        """The configs of all layers that a token passes in training, those of `mtp` included."""
        return (*self.all_layers, *(() if self.mtp is None else (self.mtp.layer,) * self.mtp.depths))

    @property
    def prefix(self) -> Stack | None:
        """The layers before the first period, as repetitions of the shortest period that makes them up."""
        layers, count = self.first_layers, len(self.first_layers)
        if not layers:
            return None
        period = next(n for n in range(1, count + 1) if count % n == 0 and layers[:n] * (count // n) == layers)
        return Stack(layers=layers[:period], times=count // period, first=0)

    @property
    def blocks(self) -> Stack:
        """The whole periods."""
        first = len(self.first_layers)
        return Stack(layers=self.layers, times=(self.num_layers - first) // len(self.layers), first=first)

    @property
    def tail(self) -> Stack | None:
        """The last period, if it is cut short."""
        rest = (self.num_layers - len(self.first_layers)) % len(self.layers)
        return None if rest == 0 else Stack(layers=self.layers[:rest], times=1, first=self.num_layers - rest)

    @property
    def mtp_stack(self) -> Stack | None:
        """The layers of the modules for multi-token prediction."""
        return (
            None if self.mtp is None else Stack(layers=(self.mtp.layer,), times=self.mtp.depths, first=self.num_layers)
        )

    @property
    @override
    def mtp_depths(self) -> int:
        return 0 if self.mtp is None else self.mtp.depths

    @property
    def remat_policies(self) -> tuple[Remat, ...]:
        """The policies that are repeated over the layers."""
        return self.remat if isinstance(self.remat, tuple) else (self.remat,)

    @property
    def short_lengths(self) -> tuple[int, ...]:
        """The lengths beyond which a document has other rotary positions (LongRoPE), the shortest first."""
        rotary = (layer.mixer.rotary(self.hidden_size) for layer in self.all_layers)
        return tuple(sorted({length for each in rotary if each and (length := each[0].short_length)}))

    def _declared_layers(self) -> Iterable[tuple[str, Layer]]:
        """Yields the layers of the config and the prefix of their fields."""
        for field in ("layers", "first_layers"):
            for index, layer in enumerate(getattr(self, field)):
                yield f"{field}.{index}.", layer
        if self.mtp is not None:
            yield "mtp.layer.", self.mtp.layer

    @override
    def in_mup(self, ratio: float) -> Self:
        changes = [f"logits_scaling={self.logits_scaling * ratio!r}"] if self.tie_embeddings else []
        for prefix, layer in self._declared_layers():
            attention = layer.mixer.attention(self.hidden_size)
            if attention is not None and getattr(layer.mixer, "head_dim", 0) is None:  # heads are wider, not more
                scale = getattr(layer.mixer, "query_scale", None) or attention[1].head_dim ** -0.5
                changes.append(f"{prefix}mixer.query_scale={scale * ratio**-0.5!r}")
        return self if ratio == 1 else apply(self, changes)

    def problems(self) -> Iterable[Problem]:
        """Yields sizes that are not divisible, and options that conflict or need another option."""
        if not self.layers:
            yield Problem(fields=("layers",), message="is empty", fix="give at least one layer in the config file")
            return
        least = len(self.first_layers) + len(self.layers)
        if self.num_layers < least:
            message = f"the first layers and one period are {least} layers"
            yield Problem(fields=("num_layers", "layers"), message=message, fix=f"use num_layers={least}")
        for prefix, layer in self._declared_layers():
            yield from layer.mixer.problems_in_model(self.hidden_size, f"{prefix}mixer.")
        if any(isinstance(layer.mlp, MixtureOfExperts) for layer in self.first_layers):
            fix = "move these layers into layers in the config file"
            yield Problem(fields=("first_layers",), message="the first layers cannot have experts", fix=fix)
        experts = {
            f"{prefix}mlp.num_experts": layer.mlp.num_experts
            for prefix, layer in self._declared_layers()
            if isinstance(layer.mlp, MixtureOfExperts)
        }
        if len({*experts.values()}) > 1:
            fix = f"use {' '.join(f'{field}={max(experts.values())}' for field in experts)}"
            message = "all layers must have the same number of experts"
            yield Problem(fields=tuple(experts), message=message, fix=fix)
        if not 0 < len(self.remat_policies) <= self.num_layers:
            message = f"{len(self.remat_policies)} policies for {self.num_layers} layers"
            yield Problem(fields=("remat", "num_layers"), message=message, fix="use remat=full")
        if self.mtp is not None and self.learned_positions is not None:
            message = "the modules read embeddings of tokens without positions"
            yield Problem(fields=("mtp", "learned_positions"), message=message, fix="use mtp=none")

    @property
    @override
    def pipeline_periods(self) -> int:
        return self.blocks.times

    @override
    def problems_of_stages(self, chunks: int) -> Iterable[Problem]:
        period, first = len(self.layers), len(self.first_layers)
        if self.blocks.times < chunks or self.tail is not None:
            message = f"stages have whole periods of {period} layers" if period > 1 else "fewer layers than chunks"
            num_layers = max(self.blocks.times, chunks) * period + first
            fix = f"use model.num_layers={num_layers} or mesh.stage=1"
            fields = ("model.num_layers", "mesh.stage", "pipeline.chunks")
            yield Problem(fields=fields, message=f"{message} ({chunks} chunks on all stages)", fix=fix)
        if self.mtp is not None:
            message = "pipeline stages do not compute modules for multi-token prediction"
            fix = "use model.mtp=none or mesh.stage=1"
            yield Problem(fields=("model.mtp", "mesh.stage"), message=message, fix=fix)

    @property
    @override
    def sharded_dims(self) -> Mapping[str, tuple[int, str]]:
        dims = {"vocab_size": (self.vocab_size, "vocab"), "hidden_size": (self.hidden_size, "embed")}
        for prefix, layer in self._declared_layers():
            for name in ("mixer", "mlp"):
                own = getattr(layer, name).sharded_dims()
                dims |= {f"{prefix}{name}.{field}": dim for field, dim in own.items()}
        return dims

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
