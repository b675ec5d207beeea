"""GPT-OSS (OpenAI 2025): attention with sinks, in every other layer with a window; experts with biases.

Published experts are MXFP4, which `interop.quantized` reads. Gate and up projections alternate there.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from jaxinfra.families.common import (
    Family,
    Fields,
    attention_rules,
    experts_of,
    fused,
    model_rules,
    norm_rules,
    of_kind,
    read_attention,
    read_fields,
    read_model,
    read_rope,
    write_fields,
    write_model,
    write_rope,
)
from jaxinfra.interop.config_json import ModelJson
from jaxinfra.interop.rules import Rule, rule
from jaxinfra.models.attention import Attention
from jaxinfra.models.moe import MixtureOfExperts
from jaxinfra.models.transformer import Layer, TransformerConfig
from jaxinfra.ops.rope import Rope, YarnScaling

WINDOW, FULL = "sliding_attention", "full_attention"
YARN = YarnScaling(factor=32.0, original_length=4096, truncate=False)
FIELDS: Fields = {
    "dim": ("intermediate_size", int),
    "num_experts": ("num_local_experts", int),
    "top_k": ("num_experts_per_tok", int),
}


def read(keys: ModelJson) -> TransformerConfig:
    """Reads the keys of a GPT-OSS."""
    for name, value in (("hidden_act", "silu"), ("swiglu_alpha", 1.702), ("swiglu_limit", 7.0)):
        keys.require(name, value, default=value)
    # The published weight of the balance loss, 0.9, is of no use: `output_router_logits` is false.
    keys.ignore("experts_per_token", "initial_context_length", "router_aux_loss_coef")
    keys.default(rms_norm_eps=1e-5)
    keys.default(**write_rope(Rope(theta=150000.0, scaling=YARN)))
    bias, window = keys.take("attention_bias", bool, True), keys.optional("sliding_window", int)
    full = read_attention(keys, rope=read_rope(keys), qkv_bias=bias, out_bias=bias, sinks=True)
    experts = MixtureOfExperts(activation="clamped_swiglu", router_bias=True, bias=True, **read_fields(keys, FIELDS))
    layers = {kind: Layer(mixer=full, mlp=experts) for kind in (WINDOW, FULL)}
    layers[WINDOW] = replace(layers[FULL], mixer=replace(full, window=window))
    count = keys.num_layers
    kinds = keys.take_kinds("layer_types", layers, count, ([WINDOW, FULL] * count)[:count])
    return read_model(keys, [layers[kind] for kind in kinds])


def write(model: TransformerConfig) -> dict[str, Any]:
    """Returns the keys of a GPT-OSS."""
    mixers = [of_kind(layer.mixer, Attention, "layers.mixer") for layer in model.all_layers]
    windows = [mixer.window for mixer in mixers]
    keys = {
        "hidden_act": "silu",
        "rope_scaling": {"rope_type": "default"},
        "attention_bias": mixers[0].qkv_bias,
        "sliding_window": next((window for window in windows if window is not None), None),
        "layer_types": [FULL if window is None else WINDOW for window in windows],
    }
    return write_model(model) | keys | write_rope(mixers[0].rope) | write_fields(experts_of(model), FIELDS)


def layer_rules(layer: Layer, model: TransformerConfig) -> Iterator[Rule]:
    """Yields the rules of a layer."""
    yield from norm_rules(layer)
    yield from attention_rules(of_kind(layer.mixer, Attention, "layers.mixer"))
    yield rule("mlp.router.weight", "mlp.router", "e d -> d e")
    yield rule("mlp.router.bias", "mlp.router_bias", "e -> e")
    weights = ((f"mlp.{name}", "e d (f {1}) -> e d (f 1)") for name in ("gate", "up"))
    biases = ((f"mlp.{name}_bias", "e (f {1}) -> e (f 1)") for name in ("gate", "up"))
    yield fused("mlp.experts.gate_up_proj", *weights)
    yield fused("mlp.experts.gate_up_proj_bias", *biases)
    yield rule("mlp.experts.down_proj", "mlp.down", "e f d -> e f d")
    yield rule("mlp.experts.down_proj_bias", "mlp.down_bias", "e d -> e d")


FAMILY = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    read=read,
    write=write,
    layer_rules=layer_rules,
    model_rules=model_rules,
)


def _shape(num_layers: int, num_experts: int) -> TransformerConfig:
    rope = Rope(theta=150000.0, scaling=YARN)
    full = Attention(num_heads=64, num_kv_heads=8, head_dim=64, rope=rope, qkv_bias=True, out_bias=True, sinks=True)
    experts = MixtureOfExperts(
        dim=2880, activation="clamped_swiglu", num_experts=num_experts, top_k=4, router_bias=True, bias=True
    )
    return TransformerConfig(
        vocab_size=201088,
        num_layers=num_layers,
        hidden_size=2880,
        layers=(Layer(mixer=replace(full, window=128), mlp=experts), Layer(mixer=full, mlp=experts)),
    )


SHAPES = {"gpt-oss-20b": _shape(num_layers=24, num_experts=32), "gpt-oss-120b": _shape(num_layers=36, num_experts=128)}
"""openai/gpt-oss-20b and gpt-oss-120b."""
