"""GPT-OSS (OpenAI 2025): attention with sinks, in every other layer with a window; experts with biases.

Published experts are MXFP4, which `interop.quantized` reads. Gate and up projections alternate there.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from jaxinfra.families.common import Family, attention_of, decoder, read_attention, read_model, write_model
from jaxinfra.families.experts import EXPERT_FIELDS, experts_of
from jaxinfra.families.rotary import write_rope
from jaxinfra.families.windows import read_windows, write_windows
from jaxinfra.interop.config_json import ModelJson, write_fields
from jaxinfra.interop.rules import Rule, fused, rule
from jaxinfra.models.moe import MixtureOfExperts
from jaxinfra.models.transformer import TransformerConfig
from jaxinfra.ops.rope import Rope, YarnScaling

ROPE = Rope(theta=150000.0, scaling=YarnScaling(factor=32.0, original_length=4096, truncate=False))

_experts = partial(MixtureOfExperts, activation="clamped_swiglu", router_bias=True, bias=True)


def read(keys: ModelJson) -> TransformerConfig:
    """Reads the keys of a GPT-OSS."""
    for name, value in (("hidden_act", "silu"), ("swiglu_alpha", 1.702), ("swiglu_limit", 7.0)):
        keys.require(name, value, default=value)
    # The published weight of the balance loss, 0.9, is of no use: `output_router_logits` is false.
    keys.ignore("experts_per_token", "initial_context_length", "router_aux_loss_coef")
    keys.default(rms_norm_eps=1e-5)
    keys.default(**write_rope(ROPE))
    mixers = read_windows(keys, read_attention(keys, bias=True, sinks=True), lambda index: index % 2 == 0)
    return read_model(keys, mixers, _experts(**keys.take_fields(EXPERT_FIELDS)))


def write(model: TransformerConfig) -> dict[str, Any]:
    """Returns the keys of a GPT-OSS."""
    mixers = attention_of(model)
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


FAMILY = Family(model_type="gpt_oss", architecture="GptOssForCausalLM", read=read, write=write, mlp_rules=experts_rules)

_gpt_oss = partial(
    decoder,
    vocab_size=201088,
    hidden_size=2880,
    num_heads=64,
    num_kv_heads=8,
    head_dim=64,
    rope=ROPE,
    qkv_bias=True,
    out_bias=True,
    sinks=True,
    kinds=({"window": 128}, {}),
)

SHAPES = {
    "gpt-oss-20b": _gpt_oss(num_layers=24, mlp=_experts(dim=2880, num_experts=32, top_k=4)),
    "gpt-oss-120b": _gpt_oss(num_layers=36, mlp=_experts(dim=2880, num_experts=128, top_k=4)),
}
"""openai/gpt-oss-20b and gpt-oss-120b."""
