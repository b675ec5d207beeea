"""Llama 4 Scout and Maverick (Meta 2025), the text part: chunked attention, layers without positions, top-1 experts.

Every fourth layer has no rotary positions and attends to everything. Both of a rotated pair stand side by side in
published weights; here they are in two halves. A token's sigmoid score multiplies what its expert is given.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from jaxinfra.families.common import (
    Family,
    attention_of,
    attention_rules,
    mlp_rules,
    read_attention,
    read_model,
    write_model,
)
from jaxinfra.families.experts import EXPERT_FIELDS, experts_of, read_experts
from jaxinfra.families.rotary import read_rope
from jaxinfra.interop.config_json import Fields, ModelJson, write_fields
from jaxinfra.interop.rules import Rule, fused, rule
from jaxinfra.models.attention import Attention, AttentionTemperature
from jaxinfra.models.layers import MLP
from jaxinfra.models.moe import MixtureOfExperts
from jaxinfra.models.transformer import Layer, TransformerConfig
from jaxinfra.ops.rope import Llama3Scaling, Rope

TOP_1: Mapping[str, Any] = {
    "num_shared_experts": 1,
    "score_function": "sigmoid",
    "normalize_weights": False,
    "scale_inputs": True,
}
TEMPERATURE: Fields = {"scale": ("attn_scale", float), "floor": ("floor_scale", int)}


def read(keys: ModelJson) -> TransformerConfig:
    """Reads the keys of a Llama 4."""
    layers = range(keys.num_layers)
    keys.default(attn_temperature_tuning=True, attn_scale=0.1, floor_scale=8192, attention_chunk_size=8192)
    keys.default(rms_norm_eps=1e-5, head_dim=128, num_experts_per_tok=1)
    keys.ignore("router_jitter_noise", "router_aux_loss_coef", "cache_implementation", "for_llm_compressor")
    interval = keys.take_between("no_rope_layer_interval", 1, default=4)
    step = keys.take_between("interleave_moe_layer_step", 1, default=1)
    rotates = keys.take_kinds("no_rope_layers", (0, 1), len(layers), [int((i + 1) % interval > 0) for i in layers])
    sparse = keys.take_indices("moe_layers", len(layers), layers[step - 1 :: step])
    chunk, rope = keys.optional("attention_chunk_size", int), read_rope(keys, theta=500000.0)
    norm = "l2" if keys.take("use_qk_norm", bool, True) else None
    rotated = read_attention(keys, rope=rope, bias=False, chunk=chunk, qk_norm=norm)
    temperature = AttentionTemperature(**keys.take_fields(TEMPERATURE))
    tuned = keys.take("attn_temperature_tuning", object)  # true, or 4
    still = replace(rotated, rope=None, chunk=None, qk_norm=None, temperature=temperature if tuned else None)
    kinds = ["chunked_attention" if chunk and rotates[i] else "full_attention" for i in layers]
    keys.require("layer_types", kinds, default=kinds)
    experts = read_experts(keys, **TOP_1)
    dense = MLP(dim=keys.take("intermediate_size_mlp", int), activation=experts.activation)
    mixers = [rotated if rotates[i] else still for i in layers]
    return read_model(keys, mixers, [experts if i in sparse else dense for i in layers])


def write(model: TransformerConfig) -> dict[str, Any]:
    """Returns the keys of a Llama 4."""
    mixers, experts, mlps = attention_of(model), experts_of(model), [layer.mlp for layer in model.all_layers]
    rotated = next((mixer for mixer in mixers if mixer.rope is not None), mixers[0])
    temperature = next((mixer.temperature for mixer in mixers if mixer.temperature is not None), None)
    keys = write_fields(experts, EXPERT_FIELDS) | {
        "model_type": "llama4_text",
        "attention_bias": rotated.qkv_bias,
        "attention_chunk_size": rotated.chunk,
        "use_qk_norm": rotated.qk_norm == "l2",
        "attn_temperature_tuning": temperature is not None,
        "no_rope_layers": [int(mixer.rope is not None) for mixer in mixers],
        "moe_layers": [i for i, mlp in enumerate(mlps) if isinstance(mlp, MixtureOfExperts)],
        "intermediate_size_mlp": next((mlp.dim for mlp in mlps if isinstance(mlp, MLP)), experts.dim),
    }
    keys |= write_fields(temperature or AttentionTemperature(), TEMPERATURE)
    return write_model(model) | keys


def feed_forward_rules(mlp: MLP | MixtureOfExperts) -> Iterator[Rule]:
    """Yields the rules of an MLP, or of a router, of experts and of a shared one."""
    if isinstance(mlp, MLP):
        yield from mlp_rules(mlp, "feed_forward")
        return
    yield rule("feed_forward.router.weight", "mlp.router", "e d -> d e")
    yield fused(
        "feed_forward.experts.gate_up_proj", *((f"mlp.{name}", "e d ({f}) -> e d f") for name in ("gate", "up"))
    )
    yield rule("feed_forward.experts.down_proj", "mlp.down", "e f d -> e f d")
    yield from mlp_rules(MLP(dim=mlp.dim), "feed_forward.shared_expert", "mlp.shared")


FAMILY = Family(
    model_type="llama4_text",
    architecture="Llama4ForCausalLM",
    read=read,
    write=write,
    mixer_rules=lambda mixer: attention_rules(mixer, pairs=mixer.rope is not None),
    mlp_rules=feed_forward_rules,
)

WITH_IMAGES = FAMILY.with_images("llama4", "vision_model")
"""The models with images: the text part is read, and written as a `llama4_text`."""


def _shape(qk_norm: bool, rope: Rope, num_experts: int, moe_step: int) -> TransformerConfig:
    rotated = Attention(num_heads=40, num_kv_heads=8, rope=rope, chunk=8192, qk_norm="l2" if qk_norm else None)
    still = replace(rotated, rope=None, chunk=None, qk_norm=None, temperature=AttentionTemperature())
    experts = MixtureOfExperts(dim=8192, num_experts=num_experts, top_k=1, **TOP_1)
    mlps, mixers = [MLP(dim=16384)] * (moe_step - 1) + [experts], (rotated, rotated, rotated, still)
    layers = tuple(Layer(mixer=mixer, mlp=mlps[i % moe_step]) for i, mixer in enumerate(mixers))
    return TransformerConfig(vocab_size=202048, num_layers=48, hidden_size=5120, layers=layers)


SHAPES = {
    "llama-4-scout": _shape(
        qk_norm=True,
        rope=Rope(theta=500000.0, scaling=Llama3Scaling(factor=16.0, high_freq_factor=1.0)),
        num_experts=16,
        moe_step=1,
    ),
    "llama-4-maverick": _shape(qk_norm=False, rope=Rope(theta=500000.0), num_experts=128, moe_step=2),
}
"""The text part of meta-llama/Llama-4-Scout-17B-16E-Instruct and Llama-4-Maverick-17B-128E-Instruct."""
