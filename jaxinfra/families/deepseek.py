"""DeepSeek V3 (DeepSeek-AI 2024) and Kimi K2 (Kimi team 2025): latent attention, and experts chosen by sigmoid scores.

In published weights the rotated features come last in a head, and both of a pair stand side by side. Here they come
first, in two halves.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from jaxinfra.families import mtp
from jaxinfra.families.common import Family, mlp_or_experts_rules, of_kind, read_model, write_model
from jaxinfra.families.experts import read_routed, routed_experts, routed_shape, write_routed
from jaxinfra.families.rotary import read_rope, write_rope
from jaxinfra.interop.config_json import Fields, ModelJson, write_fields
from jaxinfra.interop.rules import Rule, fused, rule
from jaxinfra.models.latent import LatentAttention
from jaxinfra.models.layers import NormConfig
from jaxinfra.models.transformer import TransformerConfig
from jaxinfra.ops.rope import Rope, YarnScaling

FIELDS: Fields = {
    "num_heads": ("num_attention_heads", int),
    "kv_lora_rank": ("kv_lora_rank", int),
    "qk_nope_head_dim": ("qk_nope_head_dim", int),
    "qk_rope_head_dim": ("qk_rope_head_dim", int),
    "v_head_dim": ("v_head_dim", int),
}


def read(keys: ModelJson) -> TransformerConfig:
    """Reads the keys of a DeepSeek V3."""
    heads, eps = keys.take("num_attention_heads", int), 1e-6  # the eps of latents' norms, whatever `rms_norm_eps`
    keys.default(n_group=8, topk_group=4, routed_scaling_factor=2.5, first_k_dense_replace=3)
    for name, value in (("num_key_value_heads", heads), ("rope_interleave", True), ("attention_bias", False)):
        keys.require(name, value, default=value)
    keys.ignore("head_dim", "qk_head_dim")  # they follow from others
    mixer = LatentAttention(
        q_lora_rank=keys.optional("q_lora_rank", int),
        rope=read_rope(keys, scores=True),
        norm_eps=None if keys.take("rms_norm_eps", float, 1e-6) == eps else eps,
        **keys.take_fields(FIELDS),
    )
    return mtp.DEEPSEEK.read(keys, read_model(keys, mixer, read_routed(keys)))


def write(model: TransformerConfig) -> dict[str, Any]:
    """Returns the keys of a DeepSeek V3."""
    mixer = of_kind(model.layers[0].mixer, LatentAttention, "layers.0.mixer")
    keys = write_fields(mixer, FIELDS) | write_routed(model)
    keys |= {"model_type": "deepseek_v3", "q_lora_rank": mixer.q_lora_rank, "num_key_value_heads": mixer.num_heads}
    return write_model(model) | write_rope(mixer.rope) | keys


def attention_rules(mixer: LatentAttention) -> Iterator[Rule]:
    """Yields the rules of latent attention."""
    plain, end = mixer.qk_nope_head_dim, mixer.qk_head_dim
    order = (*range(plain, end, 2), *range(plain + 1, end, 2), *range(plain))
    query = "q_proj" if mixer.q_lora_rank is None else "q_b_proj"
    if mixer.q_lora_rank is not None:
        yield rule("self_attn.q_a_proj.weight", "attention.query_down.weight", "r d -> d r")
        yield rule("self_attn.q_a_layernorm.weight", "attention.query_norm.scale", "r -> r")
    yield rule(f"self_attn.{query}.weight", "attention.query.weight", "(h k) d -> d h k", k=order)
    keys = (("attention.kv_down.weight", "({r}) d -> d r"), ("attention.rotated_key.weight", "({p 2}) d -> d (2 p)"))
    yield fused("self_attn.kv_a_proj_with_mqa.weight", *keys)
    yield rule("self_attn.kv_a_layernorm.weight", "attention.kv_norm.scale", "r -> r")
    heads = (("attention.key.weight", "(h {n}) r -> r h n"), ("attention.value.weight", "(h {v}) r -> r h v"))
    yield fused("self_attn.kv_b_proj.weight", *heads)
    yield rule("self_attn.o_proj.weight", "attention.out.weight", "d (h v) -> h v d")


FAMILY = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    read=read,
    write=write,
    mixer_rules=attention_rules,
    mlp_rules=partial(mlp_or_experts_rules, shared="mlp.shared_experts"),
    mtp=mtp.DEEPSEEK,
)

KIMI = replace(FAMILY, model_type="kimi_k2")
"""Kimi K2 has the same keys and tensors; it is written as a `deepseek_v3`."""


_attention = partial(LatentAttention, kv_lora_rank=512, q_lora_rank=1536)
_shape = partial(routed_shape, num_layers=61, hidden_size=7168, mlp_dim=18432, norm=NormConfig(eps=1e-6))
_yarn = partial(YarnScaling, original_length=4096, mscale_all_dim=1.0)

SHAPES = {
    "deepseek-v3": _shape(
        vocab_size=129280,
        num_dense=3,
        mixer=_attention(num_heads=128, rope=Rope(theta=10000.0, scaling=_yarn(factor=40.0))),
        experts=routed_experts(dim=2048, num_experts=256, num_groups=8, top_k_groups=4, routed_scaling_factor=2.5),
    ),
    "kimi-k2": _shape(
        vocab_size=163840,
        num_dense=1,
        mixer=_attention(num_heads=64, rope=Rope(theta=50000.0, scaling=_yarn(factor=32.0, beta_fast=1.0))),
        experts=routed_experts(dim=2048, num_experts=384, routed_scaling_factor=2.827),
    ),
}
"""deepseek-ai/DeepSeek-V3-Base and moonshotai/Kimi-K2-Base, without modules for multi-token prediction."""
