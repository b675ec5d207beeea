"""GPT-OSS (OpenAI 2025): attention with sinks, in every other layer with a window; experts with biases.

Published experts are MXFP4, which `interop.quantized` reads. Gate and up projections alternate there.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from jaxinfra.families.common import (
    EXPERT_FIELDS,
    Family,
    experts_of,
    fused,
    layer_rules,
    of_kind,
    read_attention,
    read_fields,
    read_model,
    read_rope,
    write_fields,
    write_model,
    write_rope,
)
from jaxinfra.families.windows import read_windows, write_windows
from jaxinfra.interop.config_json import ModelJson
from jaxinfra.interop.rules import Rule, rule
from jaxinfra.models.attention import Attention
from jaxinfra.models.moe import MixtureOfExperts
from jaxinfra.models.transformer import Layer, TransformerConfig
from jaxinfra.ops.rope import Rope, YarnScaling

YARN = YarnScaling(factor=32.0, original_length=4096, truncate=False)


def read(keys: ModelJson) -> TransformerConfig:
    """Reads the keys of a GPT-OSS."""
    for name, value in (("hidden_act", "silu"), ("swiglu_alpha", 1.702), ("swiglu_limit", 7.0)):
        keys.require(name, value, default=value)
    # The published weight of the balance loss, 0.9, is of no use: `output_router_logits` is false.
    keys.ignore("experts_per_token", "initial_context_length", "router_aux_loss_coef")
    keys.default(rms_norm_eps=1e-5)
    keys.default(**write_rope(Rope(theta=150000.0, scaling=YARN)))
    bias = keys.take("attention_bias", bool, True)
    full = read_attention(keys, rope=read_rope(keys), qkv_bias=bias, out_bias=bias, sinks=True)
    sizes = read_fields(keys, EXPERT_FIELDS)
    experts = MixtureOfExperts(activation="clamped_swiglu", router_bias=True, bias=True, **sizes)
    windows = read_windows(keys, lambda index: index % 2 == 0)
    return read_model(keys, [Layer(mixer=replace(full, window=window), mlp=experts) for window in windows])


def write(model: TransformerConfig) -> dict[str, Any]:
    """Returns the keys of a GPT-OSS."""
    mixers = [of_kind(layer.mixer, Attention, "layers.mixer") for layer in model.all_layers]
    keys: dict[str, Any] = {"rope_scaling": {"rope_type": "default"}}
    keys |= write_model(model) | write_windows(mixers)
    keys |= {"hidden_act": "silu", "attention_bias": mixers[0].qkv_bias}
    return keys | write_fields(experts_of(model), EXPERT_FIELDS)


def experts_rules(mlp: MixtureOfExperts) -> Iterator[Rule]:
    """Yields the rules of a router and of experts."""
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
    layer_rules=partial(layer_rules, feed_forward=experts_rules),
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
