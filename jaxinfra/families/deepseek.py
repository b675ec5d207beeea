"""DeepSeek V3 (DeepSeek-AI 2024) and Kimi K2 (Kimi team 2025): latent attention, and experts chosen by sigmoid scores.

In published weights the rotated features come last in a head, and both of a pair stand side by side. Here they come
first, in two halves. Layers for the prediction of several tokens are not read.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from jaxinfra.families.common import (
    Family,
    Fields,
    fused,
    mlp_or_experts_rules,
    norm_rules,
    of_kind,
    read_fields,
    read_model,
    read_rope,
    write_fields,
    write_model,
    write_rope,
)
from jaxinfra.families.routed import BALANCE, read_layers, write_layers
from jaxinfra.interop.config_json import ModelJson
from jaxinfra.interop.rules import Part, Rule, rule
from jaxinfra.models.latent import LatentAttention
from jaxinfra.models.layers import MLP, NormConfig
from jaxinfra.models.moe import MixtureOfExperts
from jaxinfra.models.transformer import Layer, TransformerConfig
from jaxinfra.ops.rope import Rope, YarnScaling

FIELDS: Fields = {
    "num_heads": ("num_attention_heads", int),
    "kv_lora_rank": ("kv_lora_rank", int),
    "qk_nope_head_dim": ("qk_nope_head_dim", int),
    "qk_rope_head_dim": ("qk_rope_head_dim", int),
    "v_head_dim": ("v_head_dim", int),
}

LATENT_EPS = 1e-6
"""The eps of the norms of latents in the published code, whatever `rms_norm_eps`."""


def read(keys: ModelJson) -> TransformerConfig:
    """Reads the keys of a DeepSeek V3."""
    heads = keys.take("num_attention_heads", int)
    keys.default(n_group=8, topk_group=4, routed_scaling_factor=2.5, first_k_dense_replace=3)
    for name, value in (("num_key_value_heads", heads), ("rope_interleave", True), ("attention_bias", False)):
        keys.require(name, value, default=value)
    keys.ignore("head_dim", "qk_head_dim")  # they follow from others
    mixer = LatentAttention(
        q_lora_rank=keys.optional("q_lora_rank", int),
        rope=read_rope(keys, scores=True),
        norm_eps=None if keys.take("rms_norm_eps", float, 1e-6) == LATENT_EPS else LATENT_EPS,
        **read_fields(keys, FIELDS),
    )
    return read_model(keys, read_layers(keys, mixer))


def write(model: TransformerConfig) -> dict[str, Any]:
    """Returns the keys of a DeepSeek V3."""
    mixer = of_kind(model.layers[0].mixer, LatentAttention, "layers.0.mixer")
    keys = write_fields(mixer, FIELDS) | write_layers(model)
    keys |= {"model_type": "deepseek_v3", "q_lora_rank": mixer.q_lora_rank, "num_key_value_heads": mixer.num_heads}
    return write_model(model) | write_rope(mixer.rope) | keys


def layer_rules(layer: Layer, model: TransformerConfig) -> Iterator[Rule]:
    """Yields the rules of a layer."""
    yield from norm_rules(layer)
    mixer, name = of_kind(layer.mixer, LatentAttention, "layers.mixer"), "self_attn"
    plain, end = mixer.qk_nope_head_dim, mixer.qk_head_dim
    order = {"k": (*range(plain, end, 2), *range(plain + 1, end, 2), *range(plain))}

    def query(theirs: str) -> Rule:
        part = Part(ours="attention.query.weight", pattern="(h k) d -> d h k", order=order)
        return Rule(theirs=f"{name}.{theirs}.weight", parts=(part,))

    if mixer.q_lora_rank is None:
        yield query("q_proj")
    else:
        yield rule(f"{name}.q_a_proj.weight", "attention.query_down.weight", "r d -> d r")
        yield rule(f"{name}.q_a_layernorm.weight", "attention.query_norm.scale", "r -> r")
        yield query("q_b_proj")
    keys = (("attention.kv_down.weight", "({r}) d -> d r"), ("attention.rotated_key.weight", "({p 2}) d -> d (2 p)"))
    yield fused(f"{name}.kv_a_proj_with_mqa.weight", *keys)
    yield rule(f"{name}.kv_a_layernorm.weight", "attention.kv_norm.scale", "r -> r")
    heads = (("attention.key.weight", "(h {n}) r -> r h n"), ("attention.value.weight", "(h {v}) r -> r h v"))
    yield fused(f"{name}.kv_b_proj.weight", *heads)
    yield rule(f"{name}.o_proj.weight", "attention.out.weight", "d (h v) -> h v d")
    yield from mlp_or_experts_rules(layer.mlp, "mlp.shared_experts")


FAMILY = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    read=read,
    write=write,
    layer_rules=layer_rules,
    unused=("*rotary_emb.inv_freq", "*lm_head.weight", "model.layers.{num_layers}.*"),
)
KIMI = replace(FAMILY, model_type="kimi_k2")
"""Kimi K2 has the same keys and tensors; it is written as a `deepseek_v3`."""


def _shape(
    vocab_size: int, num_heads: int, num_dense: int, rope: Rope, num_experts: int, **options: Any
) -> TransformerConfig:
    mixer = LatentAttention(num_heads=num_heads, kv_lora_rank=512, q_lora_rank=1536, rope=rope)
    experts = MixtureOfExperts(
        dim=2048,
        num_experts=num_experts,
        top_k=8,
        num_shared_experts=1,
        score_function="sigmoid",
        **BALANCE,
        **options,
    )
    return TransformerConfig(
        vocab_size=vocab_size,
        num_layers=61,
        hidden_size=7168,
        first_layers=(Layer(mixer=mixer, mlp=MLP(dim=18432)),) * num_dense,
        layers=(Layer(mixer=mixer, mlp=experts),),
        norm=NormConfig(eps=1e-6),
    )


SHAPES = {
    "deepseek-v3": _shape(
        vocab_size=129280,
        num_heads=128,
        num_dense=3,
        rope=Rope(theta=10000.0, scaling=YarnScaling(factor=40.0, original_length=4096, mscale_all_dim=1.0)),
        num_experts=256,
        num_groups=8,
        top_k_groups=4,
        routed_scaling_factor=2.5,
    ),
    "kimi-k2": _shape(
        vocab_size=163840,
        num_heads=64,
        num_dense=1,
        rope=Rope(
            theta=50000.0,
            scaling=YarnScaling(factor=32.0, original_length=4096, beta_fast=1.0, mscale_all_dim=1.0),
        ),
        num_experts=384,
        routed_scaling_factor=2.827,
    ),
}
"""deepseek-ai/DeepSeek-V3-Base and moonshotai/Kimi-K2-Base, without layers for the prediction of several tokens."""
