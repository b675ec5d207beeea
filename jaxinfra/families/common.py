"""Maps what most families of decoders share: names of tensors, and keys of `config.json`.

A family says in its file where it differs. Rotary positions, experts and windows are in files of these names.
"""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal

from jaxinfra.errors import ConfigError
from jaxinfra.families.canonical import stated
from jaxinfra.families.mtp import MtpNames
from jaxinfra.families.rotary import read_rope, write_rope
from jaxinfra.interop.config_json import ModelJson
from jaxinfra.interop.rules import Binding, Rule, bind, rule
from jaxinfra.models.attention import Attention
from jaxinfra.models.layers import MLP, Activation, FeedForward, NormConfig
from jaxinfra.models.mixer import Mixer
from jaxinfra.models.moe import MixtureOfExperts
from jaxinfra.models.transformer import Layer, TransformerConfig
from jaxinfra.ops.mtp import of_mtp
from jaxinfra.ops.rope import Rope

ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu_pytorch_tanh": "geglu",
    "gelu_new": "gelu",
}
"""Activations of MLPs by their names in `config.json`."""

ACTIVATION_NAMES: Mapping[Activation, str] = {"swiglu": "silu", "geglu": "gelu_pytorch_tanh", "gelu": "gelu_new"}
"""The names that are written."""

type Norms = Literal["before", "after", "both"]
"""As in `Layer`."""


def decoder(
    *,
    mlp: MLP | MixtureOfExperts | int,
    kinds: Sequence[Mapping[str, Any]] = ({},),
    norms: Norms = "before",
    **options: Any,
) -> TransformerConfig:
    """Returns a decoder; `options` are of `TransformerConfig`, and of the `Attention` of all layers.

    Args:
        mlp: of all layers; a number is the width of a plain one.
        kinds: a period of layers, by the options of `Attention` in which they differ.
        norms: as in `Layer`.
        options: see above; the two classes share no field.
    """
    own = {field.name: options.pop(field.name) for field in fields(Attention) if field.name in options}
    mlp = MLP(dim=mlp) if isinstance(mlp, int) else mlp
    layers = tuple(Layer(mixer=Attention(**{**own, **kind}), mlp=mlp, norms=norms) for kind in kinds)
    return TransformerConfig(layers=layers, **options)


def of_kind[T](found: object, kind: type[T], where: str) -> T:
    """Returns a part of a model; raises ConfigError if it is of another class than the family has there."""
    if not isinstance(found, kind):
        raise ConfigError(f"{where} is {type(found).__name__}; this family has {kind.__name__}")
    return found


def attention_of(model: TransformerConfig) -> list[Attention]:
    """Returns the attention of each layer; raises ConfigError for a layer with another mixer."""
    return [of_kind(layer.mixer, Attention, "layers.mixer") for layer in model.all_layers]


def dense_layers(model: TransformerConfig) -> list[tuple[Attention, MLP]]:
    """Returns the attention and the MLP of each layer; raises ConfigError for a layer with others."""
    found = list[tuple[Attention, MLP]]()
    for index, layer in enumerate(model.all_layers):
        if not isinstance(layer.mixer, Attention) or not isinstance(layer.mlp, MLP):
            has = f"{type(layer.mixer).__name__} and {type(layer.mlp).__name__}"
            raise ConfigError(f"layer {index} has {has}; this family has Attention and MLP")
        found.append((layer.mixer, layer.mlp))
    return found


# Rules


def model_rules(model: TransformerConfig) -> Iterator[Rule]:
    """Yields the rules of embeddings, the last norm and the LM head."""
    yield rule("model.embed_tokens.weight", "embedding", "v d -> v d")
    yield rule("model.norm.weight", "norm.scale", "d -> d")
    if not model.tie_embeddings:
        yield rule("lm_head.weight", "unembedding", "v d -> d v")


NORMS: Mapping[Norms, Mapping[str, str]] = {
    "before": {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "after": {"attention_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"},
    "both": {
        "attention_norm": "input_layernorm",
        "attention_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
}
"""Names of the norms of a layer, by where they are: `post_attention_layernorm` is two different ones."""


def norm_rules(layer: Layer) -> Iterator[Rule]:
    """Yields the rules of a layer's norms, and of the number that multiplies its output."""
    for ours, theirs in NORMS[layer.norms].items():
        yield rule(f"{theirs}.weight", f"{ours}.scale", "d -> d")
    if layer.output_scale:
        yield rule("layer_scalar", "output_scale", "s -> s")


def attention_rules(mixer: Mixer, pairs: bool = False) -> Iterator[Rule]:
    """Yields the rules of attention with separate projections; with `pairs`, both of a rotated pair stand together."""
    mixer = of_kind(mixer, Attention, "layers.mixer")
    for short, ours in (("q", "query"), ("k", "key"), ("v", "value"))[: 2 if mixer.share_kv else 3]:
        theirs, own = ("(h k 2)", "h (2 k)") if pairs and ours != "value" else ("(h k)", "h k")
        yield rule(f"self_attn.{short}_proj.weight", f"attention.{ours}.weight", f"{theirs} d -> d {own}")
        if mixer.qkv_bias:
            yield rule(f"self_attn.{short}_proj.bias", f"attention.{ours}.bias", f"{theirs} -> {own}")
        if mixer.qk_norm in ("head", "all") and ours != "value":
            pattern = "k -> k" if mixer.qk_norm == "head" else "(h k) -> h k"
            yield rule(f"self_attn.{short}_norm.weight", f"attention.{ours}_norm.scale", pattern)
    yield rule("self_attn.o_proj.weight", "attention.out.weight", "d (h k) -> h k d")
    if mixer.out_bias:
        yield rule("self_attn.o_proj.bias", "attention.out.bias", "d -> d")
    if mixer.sinks:
        yield rule("self_attn.sinks", "attention.sinks", "h -> h")


def mlp_rules(mlp: MLP, name: str = "mlp", ours: str = "mlp") -> Iterator[Rule]:
    """Yields the rules of an MLP with separate projections."""
    for matrix in ("gate", "up", "down"):
        if matrix == "gate" and mlp.activation == "gelu":
            continue
        yield rule(f"{name}.{matrix}_proj.weight", f"{ours}.{matrix}.weight", "o i -> i o")
        if mlp.bias:
            yield rule(f"{name}.{matrix}_proj.bias", f"{ours}.{matrix}.bias", "o -> o")


def mlp_or_experts_rules(mlp: FeedForward, shared: str = "mlp.shared_expert") -> Iterator[Rule]:
    """Yields the rules of an MLP; or of a router, of experts in tensors of their own, and of `shared` experts."""
    if isinstance(mlp, MLP):
        yield from mlp_rules(mlp)
        return
    experts = of_kind(mlp, MixtureOfExperts, "layers.mlp")
    yield rule("mlp.gate.weight", "mlp.router", "e d -> d e")
    if experts.bias_update_rate:
        yield rule("mlp.gate.e_score_correction_bias", "mlp.bias", "e -> e")
    for matrix in ("gate", "up", "down"):
        yield rule(f"mlp.experts.{{e}}.{matrix}_proj.weight", f"mlp.{matrix}", "o i -> e i o")
    if experts.num_shared_experts:
        yield from mlp_rules(MLP(dim=experts.dim), shared, "mlp.shared")
    if experts.shared_gate:
        yield rule(f"{shared}_gate.weight", "mlp.shared_gate", "1 d -> d 1")


@dataclass(frozen=True, kw_only=True)
class Family:
    """How the models of one `model_type` are published.

    Attributes:
        model_type: the key in `config.json`.
        architecture: the class of transformers that runs them.
        read: returns the model of a `config.json`.
        write: returns the keys of a model, without those of every model. If the family cannot say what the model has,
            `read(write(model))` is another model (see `families.canonical`), or ConfigError is raised.
        model_rules: returns the rules of what is outside of layers.
        norm_rules, mixer_rules, mlp_rules: return the rules of a layer's norms, of its mixer, and of its MLP or
            experts, in the order in which they are written; names begin after `layer_prefix`.
        layer_prefix: begins the names of a layer's tensors.
        unused: patterns of tensors that a model does without, as in `fnmatch`: buffers, copies of tied embeddings, or
            layers for other purposes.
        max_positions: the longest sequence of a model whose config does not tell it.
        other_prefix: how names begin, and how they begin instead in some checkpoints, which are read as well.
        mtp: the names of modules for multi-token prediction; None if the family has none.
    """

    model_type: str
    architecture: str
    read: Callable[[ModelJson], TransformerConfig]
    write: Callable[[TransformerConfig], dict[str, Any]]
    model_rules: Callable[[TransformerConfig], Iterable[Rule]] = model_rules
    norm_rules: Callable[[Layer], Iterable[Rule]] = norm_rules
    mixer_rules: Callable[[Any], Iterable[Rule]] = attention_rules
    mlp_rules: Callable[[Any], Iterable[Rule]] = mlp_or_experts_rules
    layer_prefix: str = "model.layers.{layer}."
    unused: tuple[str, ...] = ("*rotary_emb.inv_freq", "*lm_head.weight")
    max_positions: int = 2048
    other_prefix: tuple[str, str] = ("", "")
    mtp: MtpNames | None = None

    def with_images(
        self, model_type: str, vision: str = "vision_tower", other_prefix: tuple[str, str] = ("", "language_model.")
    ) -> "Family":
        """Returns the family of models with images, of which the text part is read, and written as this one."""
        return replace(
            self,
            model_type=model_type,
            read=lambda keys: read_text_part(keys, self.read),
            other_prefix=other_prefix,
            unused=(*self.unused, f"{vision}.*", "multi_modal_projector.*", "model.embed_vision.*"),
        )

    def bindings(
        self, model: TransformerConfig, shapes: Mapping[str, Sequence[int]], tensors: Container[str] = ()
    ) -> list[Binding]:
        """Binds the rules to a model; `tensors` are the names in a checkpoint, if there is one.

        Modules for multi-token prediction are left out if `shapes` has none. Raises ConfigError if a parameter has no
        rule.
        """
        rules = list(self.model_rules(model))
        is_other = self._other_name(rules[0].theirs) in tensors

        def named(each: Rule, before: str = "") -> Rule:
            theirs = f"{before}{each.theirs}"
            return replace(each, theirs=self._other_name(theirs) if is_other else theirs)

        found = [bind(named(each), shapes) for each in rules]
        for name in ("prefix", "blocks", "tail"):  # the stacks of a decoder, and the paths of their parameters
            stack = getattr(model, name)
            if stack is None:
                continue
            for position, layer in enumerate(stack.layers):
                prefix = f"{name}." + (f"layer_{position}." if len(stack.layers) > 1 else "")
                first, step = stack.first + position, len(stack.layers)
                layers = tuple(range(first, first + step * stack.times, step))
                for each in self._layer_rules(layer):
                    found.append(bind(named(each, self.layer_prefix), shapes, prefix=prefix, layers=layers))
        if self.mtp is not None and model.mtp is not None and any(map(of_mtp, shapes)):
            layers = self.mtp.layers(model)
            found += [bind(named(each), shapes, prefix="mtp.", layers=layers) for each in self.mtp.rules()]
            for each in self._layer_rules(model.mtp.layer):
                found.append(bind(named(each, self.mtp.layer_prefix), shapes, prefix="mtp.block.", layers=layers))
            found += [replace(bind(named(each), shapes), is_copy=True) for each in self.mtp.copy_rules(model)]
        covered = {part.path for binding in found for part in binding.parts}
        if missing := sorted(shapes.keys() - covered):
            raise ConfigError(f"{self.architecture} has no tensor for the parameter {missing[0]}")
        return found

    def _layer_rules(self, layer: Layer) -> list[Rule]:
        return [*self.norm_rules(layer), *self.mixer_rules(layer.mixer), *self.mlp_rules(layer.mlp)]

    def _other_name(self, theirs: str) -> str:
        start, other = self.other_prefix
        return f"{other}{theirs.removeprefix(start)}" if theirs.startswith(start) else theirs


# Keys


def read_attention(keys: ModelJson, *, rope: Rope | None = None, bias: bool | None = None, **options: Any) -> Attention:
    """Reads the heads of attention.

    Args:
        keys: the keys of the model.
        rope: its rotary positions; None reads them, with the defaults of `read_rope`.
        bias: the default of `attention_bias`, which all projections have; None if the family has no such key.
        options: of `Attention`.
    """
    if bias is not None:
        options["qkv_bias"] = options["out_bias"] = keys.take("attention_bias", bool, bias)
    rope = read_rope(keys) if rope is None else rope
    heads, head_dim = keys.take("num_attention_heads", int), keys.optional("head_dim", int)
    kv_heads = keys.take("num_key_value_heads", int, heads)
    return Attention(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, rope=rope, **options)


def read_mlp(keys: ModelJson, activation_key: str = "hidden_act", **options: Any) -> MLP:
    """Reads the width and the activation of an MLP; `options` are of `MLP`."""
    return MLP(dim=keys.take("intermediate_size", int), activation=read_activation(keys, activation_key), **options)


def read_activation(keys: ModelJson, name: str = "hidden_act") -> Activation:
    """Reads the activation of MLPs."""
    keys.default(hidden_act="silu")
    keys.require(name, *ACTIVATIONS)
    return ACTIVATIONS[keys.take(name, str)]


def read_model(
    keys: ModelJson,
    mixers: Mixer | Sequence[Mixer],
    mlps: FeedForward | Sequence[FeedForward] | None = None,
    *,
    norms: Norms = "before",
    norm_offset: float = 0.0,
    output_scale: bool = False,
    **options: Any,
) -> TransformerConfig:
    """Reads the sizes of a decoder.

    Args:
        keys: the keys of the model.
        mixers: the mixer of all layers, or that of each.
        mlps: the MLP or the experts of all layers, or those of each; None reads an MLP.
        norms: as in `Layer`.
        norm_offset: as in `NormConfig`.
        output_scale: as in `Layer`.
        options: of `TransformerConfig`.
    """
    num_layers, mlps = keys.num_layers, read_mlp(keys) if mlps is None else mlps
    mixers = [mixers] * num_layers if isinstance(mixers, Mixer) else mixers
    mlps = [mlps] * num_layers if isinstance(mlps, FeedForward) else mlps
    layer = partial(Layer, norms=norms, output_scale=output_scale)
    layers = [layer(mixer=mixer, mlp=mlp) for mixer, mlp in zip(mixers, mlps, strict=True)]
    first, period = split_first(layers)
    keys.ignore("dtype", "torch_dtype")  # the dtype of the stored tensors, which say it themselves
    return TransformerConfig(
        vocab_size=keys.take("vocab_size", int),
        num_layers=num_layers,
        hidden_size=keys.take("hidden_size", int),
        first_layers=first,
        layers=period,
        norm=NormConfig(eps=keys.take("rms_norm_eps", float, 1e-6), offset=norm_offset),
        tie_embeddings=keys.take("tie_word_embeddings", bool, False),
        **options,
    )


def read_text_part(keys: ModelJson, read: Callable[[ModelJson], TransformerConfig]) -> TransformerConfig:
    """Reads the text part of a model with images, which is in `text_config`, or a text model that is written for it."""
    if "text_config" not in keys:
        return read(keys)
    part = keys.part("text_config")
    model = read(part)
    part.close(stated(model))
    if "tie_word_embeddings" in keys:
        model = replace(model, tie_embeddings=keys.take("tie_word_embeddings", bool))
    keys.ignore("dtype", "torch_dtype", "vision_config", "vision_feature_layer", "spatial_merge_size")
    keys.ignore(
        "mm_tokens_per_image", "vision_soft_tokens_per_image", "multimodal_projector_bias", "projector_hidden_act"
    )
    names = ("image", "boi", "eoi", "audio", "boa", "eoa", "video", "vision_start", "vision_end")
    keys.ignore(*(f"{name}_token_{kind}" for name in names for kind in ("index", "id")))
    return model


def shortest_period(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """Returns the shortest period of layers; its last repetition may be cut short."""
    count = len(layers)
    fits = (n for n in range(1, count + 1) if all(layers[i] == layers[i % n] for i in range(n, count)))
    return tuple(layers[: next(fits)])


def split_first(layers: Sequence[Layer]) -> tuple[tuple[Layer, ...], tuple[Layer, ...]]:
    """Splits all layers into dense ones before the first experts and a period, if that is shorter than one period."""
    dense = next((i for i, layer in enumerate(layers) if not isinstance(layer.mlp, MLP)), 0)
    period, rest = shortest_period(layers), shortest_period(layers[dense:])
    return (tuple(layers[:dense]), rest) if dense + len(rest) <= len(period) else ((), period)


def write_model(model: TransformerConfig) -> dict[str, Any]:
    """Returns the keys of a decoder's sizes, of attention and rotary positions, and of the MLP of its first layer."""
    keys: dict[str, Any] = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "rms_norm_eps": model.norm.eps,
        "tie_word_embeddings": model.tie_embeddings,
    }
    attention = [layer.mixer for layer in model.all_layers if isinstance(layer.mixer, Attention)]
    if attention:  # published files tell the rotary positions of layers without a window
        first = min(attention, key=lambda mixer: (mixer.rope is None, mixer.window is not None))
        keys |= {
            "num_attention_heads": first.num_heads,
            "num_key_value_heads": first.kv_head_count,
            "head_dim": first.head_width(model.hidden_size),
        }
        keys |= write_rope(first.rope)
    mlp = model.layer(0).mlp
    if isinstance(mlp, MLP):
        keys["intermediate_size"] = mlp.dim
    if isinstance(mlp, MLP | MixtureOfExperts):
        keys["hidden_act"] = ACTIVATION_NAMES.get(mlp.activation)
    return keys
