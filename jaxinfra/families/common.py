"""Maps what most families of decoders share: names of tensors, and keys of `config.json`.

A family says in its file where it differs.
"""

import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from jaxinfra.errors import ConfigError, quoted
from jaxinfra.families.canonical import stated
from jaxinfra.interop.config_json import ModelJson
from jaxinfra.interop.rules import Binding, Part, Rule, bind, rule
from jaxinfra.models.attention import Attention
from jaxinfra.models.layers import MLP, Activation, FeedForward, NormConfig
from jaxinfra.models.moe import MixtureOfExperts
from jaxinfra.models.transformer import Layer, TransformerConfig
from jaxinfra.ops.rope import LinearScaling, Llama3Scaling, LongRopeScaling, Rope, YarnScaling

ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu_pytorch_tanh": "geglu",
    "gelu_new": "gelu",
}
"""Activations of MLPs by their names in `config.json`."""

ACTIVATION_NAMES: Mapping[Activation, str] = {"swiglu": "silu", "geglu": "gelu_pytorch_tanh", "gelu": "gelu_new"}


def decoder(
    *,
    mlp: MLP | MixtureOfExperts | int,
    kinds: Sequence[Mapping[str, Any]] = ({},),
    norms: Literal["before", "after", "both"] = "before",
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


# Rules


def model_rules(model: TransformerConfig) -> Iterator[Rule]:
    """Yields the rules of embeddings, the last norm and the LM head."""
    yield rule("model.embed_tokens.weight", "embedding", "v d -> v d")
    yield rule("model.norm.weight", "norm.scale", "d -> d")
    if not model.tie_embeddings:
        yield rule("lm_head.weight", "unembedding", "v d -> d v")


NORMS: Mapping[str, Mapping[str, str]] = {
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
    """Yields the rules of a layer's norms."""
    for ours, theirs in NORMS[layer.norms].items():
        yield rule(f"{theirs}.weight", f"{ours}.scale", "d -> d")


def attention_rules(mixer: Attention, pairs: bool = False) -> Iterator[Rule]:
    """Yields the rules of attention with separate projections; with `pairs`, both of a rotated pair stand together."""
    for short, ours in (("q", "query"), ("k", "key"), ("v", "value")):
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


def experts_rules(mlp: MixtureOfExperts, shared: str = "mlp.shared_expert") -> Iterator[Rule]:
    """Yields the rules of a router, of experts in tensors of their own, and of shared experts."""
    yield rule("mlp.gate.weight", "mlp.router", "e d -> d e")
    if mlp.bias_update_rate:
        yield rule("mlp.gate.e_score_correction_bias", "mlp.bias", "e -> e")
    for matrix in ("gate", "up", "down"):
        yield rule(f"mlp.experts.{{e}}.{matrix}_proj.weight", f"mlp.{matrix}", "o i -> e i o")
    if mlp.num_shared_experts:
        yield from mlp_rules(MLP(dim=mlp.dim), shared, "mlp.shared")
    if mlp.shared_gate:
        yield rule(f"{shared}_gate.weight", "mlp.shared_gate", "1 d -> d 1")


def mlp_or_experts_rules(mlp: FeedForward, shared: str = "mlp.shared_expert") -> Iterator[Rule]:
    """Returns the rules of an MLP, or of experts."""
    if isinstance(mlp, MLP):
        return mlp_rules(mlp)
    return experts_rules(of_kind(mlp, MixtureOfExperts, "layers.mlp"), shared)


def layer_rules(
    layer: Layer, model: TransformerConfig, feed_forward: Callable[[Any], Iterable[Rule]] = mlp_or_experts_rules
) -> Iterator[Rule]:
    """Yields the rules of a layer with attention; `feed_forward` returns those of its MLP or experts."""
    yield from norm_rules(layer)
    yield from attention_rules(of_kind(layer.mixer, Attention, "layers.mixer"))
    yield from feed_forward(layer.mlp)


def fused(theirs: str, *parts: tuple[str, str], **sizes: int) -> Rule:
    """Returns the rule of a tensor that holds several parameters: `(path, pattern)` of each."""
    return Rule(theirs=theirs, parts=tuple(Part(ours=ours, pattern=pattern, sizes=sizes) for ours, pattern in parts))


@dataclass(frozen=True, kw_only=True)
class Family:
    """How the models of one `model_type` are published.

    Attributes:
        model_type: the key in `config.json`.
        architecture: the class of transformers that runs them.
        read: returns the model of a `config.json`.
        write: returns the keys of a model, without those of every model. If the family cannot say what the model has,
            `read(write(model))` is another model (see `families.canonical`), or ConfigError is raised.
        layer_rules: returns the rules of a layer; names begin after `layer_prefix`.
        model_rules: returns the rules of what is outside of layers.
        layer_prefix: begins the names of a layer's tensors.
        unused: patterns of tensors that a model does without, as in `fnmatch`: buffers, copies of tied embeddings, or
            layers for other purposes; `{num_layers}` stands for the number of layers.
        max_positions: the longest sequence of a model whose config does not tell it.
        other_prefix: how names begin, and how they begin instead in some checkpoints, which are read as well.
    """

    model_type: str
    architecture: str
    read: Callable[[ModelJson], TransformerConfig]
    write: Callable[[TransformerConfig], dict[str, Any]]
    layer_rules: Callable[[Layer, TransformerConfig], Iterable[Rule]] = layer_rules
    model_rules: Callable[[TransformerConfig], Iterable[Rule]] = model_rules
    layer_prefix: str = "model.layers.{layer}."
    unused: tuple[str, ...] = ("*rotary_emb.inv_freq", "*lm_head.weight")
    max_positions: int = 2048
    other_prefix: tuple[str, str] = ("", "")

    def with_images(self, model_type: str, vision: str = "vision_tower") -> "Family":
        """Returns the family of models with images, of which the text part is read, and written as this one."""
        return replace(
            self,
            model_type=model_type,
            read=lambda keys: read_text_part(keys, self.read),
            other_prefix=("", "language_model."),
            unused=(*self.unused, f"{vision}.*", "multi_modal_projector.*"),
        )

    def unused_by(self, model: TransformerConfig) -> tuple[str, ...]:
        """Returns patterns of tensors that a model does without."""
        return tuple(pattern.replace("{num_layers}", str(model.num_layers)) for pattern in self.unused)

    def bindings(
        self, model: TransformerConfig, shapes: Mapping[str, Sequence[int]], tensors: Container[str] = ()
    ) -> list[Binding]:
        """Binds the rules to a model; `tensors` are the names in a checkpoint, if there is one.

        Raises ConfigError if a parameter of the model has no rule.
        """
        rules = list(self.model_rules(model))
        is_other = self._other_name(rules[0].theirs) in tensors

        def named(each: Rule, before: str = "") -> Rule:
            theirs = f"{before}{each.theirs}"
            return replace(each, theirs=self._other_name(theirs) if is_other else theirs)

        found = [bind(named(each), shapes) for each in rules]
        for name in ("prefix", "blocks", "tail"):
            stack = getattr(model, name)
            if stack is None:
                continue
            for position, layer in enumerate(stack.layers):
                prefix = f"{name}." + (f"layer_{position}." if len(stack.layers) > 1 else "")
                first, step = stack.first + position, len(stack.layers)
                layers = tuple(range(first, first + step * stack.times, step))
                for each in self.layer_rules(layer, model):
                    found.append(bind(named(each, self.layer_prefix), shapes, prefix=prefix, layers=layers))
        covered = {part.path for binding in found for part in binding.parts}
        if missing := sorted(shapes.keys() - covered):
            raise ConfigError(f"{self.architecture} has no tensor for the parameter {missing[0]}")
        return found

    def _other_name(self, theirs: str) -> str:
        start, other = self.other_prefix
        return f"{other}{theirs.removeprefix(start)}" if theirs.startswith(start) else theirs


# Keys

type Fields = Mapping[str, tuple[str, type]]
"""Fields of a config class: for each the key in `config.json` and its type."""

EXPERT_FIELDS: Fields = {
    "dim": ("intermediate_size", int),
    "num_experts": ("num_local_experts", int),
    "top_k": ("num_experts_per_tok", int),
}
"""Fields of `MixtureOfExperts` in families whose `intermediate_size` is the width of an expert."""


def read_fields(keys: ModelJson, fields: Fields, **defaults: Any) -> dict[str, Any]:
    """Reads fields; raises ConfigError if a key is missing whose field is not in `defaults`."""
    return {field: keys.take(key, kind, defaults.get(field)) for field, (key, kind) in fields.items()}


def write_fields(config: object, fields: Fields) -> dict[str, Any]:
    """Returns the keys of fields."""
    return {key: getattr(config, field) for field, (key, _) in fields.items()}


def of_kind[T](found: object, kind: type[T], where: str) -> T:
    """Returns a part of a model; raises ConfigError if it is of another class than the family has there."""
    if not isinstance(found, kind):
        raise ConfigError(f"{where} is {type(found).__name__}; this family has {kind.__name__}")
    return found


def experts_of(model: TransformerConfig) -> MixtureOfExperts:
    """Returns the experts of the first layer with some; raises ConfigError if there is none."""
    found = (layer.mlp for layer in model.all_layers if isinstance(layer.mlp, MixtureOfExperts))
    return of_kind(next(found, None), MixtureOfExperts, "layers.mlp")


def read_attention(keys: ModelJson, **options: Any) -> Attention:
    """Reads the heads of attention; `options` are of `Attention`."""
    heads, head_dim = keys.take("num_attention_heads", int), keys.optional("head_dim", int)
    return Attention(
        num_heads=heads,
        num_kv_heads=keys.take("num_key_value_heads", int, heads),
        head_dim=head_dim,
        **options,
    )


def read_mlp(keys: ModelJson, **options: Any) -> MLP:
    """Reads the width and the activation of an MLP; `options` are of `MLP`."""
    return MLP(dim=keys.take("intermediate_size", int), activation=read_activation(keys), **options)


def read_activation(keys: ModelJson, name: str = "hidden_act") -> Activation:
    """Reads the activation of MLPs."""
    keys.default(hidden_act="silu")
    keys.require(name, *ACTIVATIONS)
    return ACTIVATIONS[keys.take(name, str)]


def read_model(keys: ModelJson, layers: Sequence[Layer], **options: Any) -> TransformerConfig:
    """Reads the sizes of a decoder; `layers` are all layers or one period, `options` of `TransformerConfig`."""
    num_layers = keys.num_layers
    first, period = split_first(layers) if len(layers) == num_layers else ((), shortest_period(layers))
    keys.ignore("dtype", "torch_dtype")  # the dtype of the stored tensors, which say it themselves
    options = {"norm": NormConfig(eps=keys.take("rms_norm_eps", float, 1e-6))} | options
    return TransformerConfig(
        vocab_size=keys.take("vocab_size", int),
        num_layers=num_layers,
        hidden_size=keys.take("hidden_size", int),
        first_layers=first,
        layers=period,
        tie_embeddings=keys.take("tie_word_embeddings", bool, False),
        **options,
    )


def dense_layers(model: TransformerConfig) -> list[tuple[Attention, MLP]]:
    """Returns the attention and the MLP of each layer; raises ConfigError for a layer with others."""
    found = list[tuple[Attention, MLP]]()
    for index, layer in enumerate(model.all_layers):
        if not isinstance(layer.mixer, Attention) or not isinstance(layer.mlp, MLP):
            has = f"{type(layer.mixer).__name__} and {type(layer.mlp).__name__}"
            raise ConfigError(f"layer {index} has {has}; this family has Attention and MLP")
        found.append((layer.mixer, layer.mlp))
    return found


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
    keys.ignore("mm_tokens_per_image", "multimodal_projector_bias", "projector_hidden_act")
    keys.ignore(*(f"{name}_token_{kind}" for name in ("image", "boi", "eoi") for kind in ("index", "id")))
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


# Rotary positions

type Scaling = LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling

LLAMA3_FIELDS: Fields = {
    "factor": ("factor", float),
    "low_freq_factor": ("low_freq_factor", float),
    "high_freq_factor": ("high_freq_factor", float),
    "original_length": ("original_max_position_embeddings", int),
}
YARN_FIELDS: Fields = {
    "factor": ("factor", float),
    "original_length": ("original_max_position_embeddings", int),
    "beta_fast": ("beta_fast", float),
    "beta_slow": ("beta_slow", float),
    "truncate": ("truncate", bool),
}


def read_rope(
    keys: ModelJson, kind: str | None = None, theta: float = 10000.0, partial: bool = False, scores: bool = False
) -> Rope:
    """Reads rotary positions; `theta` is the default, and `partial` says whether a part of a head may be rotated.

    `scores` says whether YaRN multiplies attention scores by `m(mscale_all_dim) ** 2`, as DeepSeek's attention does.
    Published files have `rope_theta` and `rope_scaling`; those of transformers 5 have both in `rope_parameters`, for
    models with two kinds of layers an object for each `kind`.
    """
    options = ModelJson({}, keys.where)
    for name in ("rope_scaling", "rope_parameters"):
        if name in keys:
            options = keys.part(name)
            options = options.part(kind) if kind is not None and kind in options else options
    keys.ignore("rope_scaling", "rope_parameters")
    theta = options.take("rope_theta", float, keys.take("rope_theta", float, theta))
    fraction = options.take("partial_rotary_factor", float, keys.take("partial_rotary_factor", float, 1.0))
    if fraction != 1 and not partial:
        raise ConfigError(f"{keys.where}: partial_rotary_factor is {fraction}; this family has none but 1")
    rope = Rope(theta=theta, fraction=fraction, scaling=_read_scaling(options, keys, scores))
    options.close()
    return rope


def _read_scaling(keys: ModelJson, model: ModelJson, scores: bool) -> Scaling | None:
    """Reads scaling from its own keys and those of the model."""
    kind = keys.take("rope_type", str, keys.take("type", str, "default"))
    match kind:
        case "default":
            return None
        case "linear":
            return LinearScaling(factor=keys.take("factor", float))
        case "llama3":
            return Llama3Scaling(**read_fields(keys, LLAMA3_FIELDS))
        case "yarn":
            return _read_yarn(keys, model, scores)
        case "longrope" | "su":
            return _read_longrope(keys, model)
        case _:
            known = "default, linear, llama3, yarn or longrope"
            raise ConfigError(f"{keys.where}: rope_type={quoted(repr(kind))} is not supported; use {known}")


def _read_yarn(keys: ModelJson, model: ModelJson, scores: bool) -> YarnScaling:
    """Reads YaRN; the factor on cosines and sines is `attention_factor`, or from both mscales, or `m(1)`."""
    original = keys.take("original_max_position_embeddings", int, model.optional("max_position_embeddings", int))
    if "factor" not in keys:
        keys.default(factor=model.take("max_position_embeddings", int) / original)
    defaults = {"original_length": original, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
    yarn = YarnScaling(**read_fields(keys, YARN_FIELDS, **defaults))
    mscale, all_dim = (keys.take(name, float, 0.0) for name in ("mscale", "mscale_all_dim"))
    if yarn.factor <= 1:  # then m is 1 for all weights
        keys.require("attention_factor", 1, default=1)
        return yarn
    on_table = yarn.m(mscale) / yarn.m(all_dim) if mscale and all_dim else yarn.m(1)
    on_table, on_scores = keys.take("attention_factor", float, on_table), all_dim if scores else 0.0
    mscale = (on_table * yarn.m(on_scores) - 1) / (0.1 * math.log(yarn.factor))  # so that `table_scale` is `on_table`
    return replace(yarn, mscale=round(mscale, 9), mscale_all_dim=on_scores)


def _read_longrope(keys: ModelJson, model: ModelJson) -> LongRopeScaling:
    """Reads LongRoPE: "long_factor", and "short_factor" for documents up to the original length."""
    longest = model.take("max_position_embeddings", int)
    original = keys.take("original_max_position_embeddings", int, longest)
    original = model.take("original_max_position_embeddings", int, original)
    keys.require("attention_factor", None)
    lists = [keys.take(name, list) for name in ("long_factor", "short_factor")]
    if original < 2 or not all(isinstance(each, (int, float)) for each in sum(lists, [])):
        expected = "long_factor and short_factor must be lists of numbers, and the original length at least 2"
        raise ConfigError(f"{keys.where}: {expected}")
    long, short = (tuple(map(float, each)) for each in lists)
    factor = keys.take("factor", float, max(longest / original, 1.0))
    short = () if short == long else short
    return LongRopeScaling(divisors=long, short_divisors=short, factor=factor, original_length=original)


def write_rope(rope: Rope | None) -> dict[str, Any]:
    """Returns the keys of rotary positions, in the form of published files."""
    if rope is None:
        return {}
    keys: dict[str, Any] = {"rope_theta": rope.theta}
    if rope.fraction != 1:
        keys["partial_rotary_factor"] = rope.fraction
    match rope.scaling:
        case LinearScaling(factor=factor):
            keys["rope_scaling"] = {"rope_type": "linear", "factor": factor}
        case Llama3Scaling() as scaling:
            keys["rope_scaling"] = {"rope_type": "llama3"} | write_fields(scaling, LLAMA3_FIELDS)
        case YarnScaling() as scaling:
            keys["max_position_embeddings"] = round(scaling.factor * scaling.original_length)
            keys["rope_scaling"] = _write_yarn(scaling)
        case LongRopeScaling() as scaling:
            keys["max_position_embeddings"] = round(scaling.factor * scaling.original_length)
            keys["rope_scaling"] = {
                **dict.fromkeys(("type", "rope_type"), "longrope"),  # engines look for either
                "long_factor": [*scaling.divisors],
                "short_factor": [*(scaling.short_divisors or scaling.divisors)],
                "original_max_position_embeddings": scaling.original_length,
            }
        case None:
            pass
    return keys


def _write_yarn(scaling: YarnScaling) -> dict[str, Any]:
    keys = {"rope_type": "yarn"} | write_fields(scaling, YARN_FIELDS)
    if scaling.mscale_all_dim:
        return keys | {"mscale": scaling.mscale, "mscale_all_dim": scaling.mscale_all_dim}
    return keys if scaling.mscale == 1 else keys | {"attention_factor": scaling.m(scaling.mscale)}
