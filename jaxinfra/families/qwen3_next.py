"""Qwen3-Next (Qwen team 2025): gated delta nets, gated attention in every fourth layer, and many experts.

Projections of delta nets are published by key head: its query, its key, then values and gates of the value heads that
share it.
"""

from collections.abc import Callable, Iterator
from typing import Any

from jaxinfra.families import mtp
from jaxinfra.families.common import Family, attention_rules, of_kind, read_attention, read_model, write_model
from jaxinfra.families.experts import experts_of
from jaxinfra.families.qwen3_moe import read_mlps, write_mlps
from jaxinfra.families.rotary import read_rope
from jaxinfra.interop.config_json import Fields, ModelJson, write_fields
from jaxinfra.interop.rules import Rule, fused, rule
from jaxinfra.models.attention import Attention
from jaxinfra.models.delta_net import GatedDeltaNet
from jaxinfra.models.layers import MLP, NormConfig
from jaxinfra.models.moe import MixtureOfExperts
from jaxinfra.models.transformer import Layer, TransformerConfig
from jaxinfra.ops.rope import Rope

LINEAR, FULL = "linear_attention", "full_attention"
FIELDS: Fields = {
    "num_key_heads": ("linear_num_key_heads", int),
    "num_value_heads": ("linear_num_value_heads", int),
    "key_head_dim": ("linear_key_head_dim", int),
    "value_head_dim": ("linear_value_head_dim", int),
    "conv_width": ("linear_conv_kernel_dim", int),
}


def read(keys: ModelJson) -> TransformerConfig:
    """Reads the keys of a Qwen3-Next."""
    keys.default(norm_topk_prob=True, num_key_value_heads=2)
    mixers = read_mixers(keys)
    return mtp.QWEN.read(keys, read_model(keys, mixers, read_shared_mlps(keys), norm_offset=1.0))


def read_mixers(keys: ModelJson) -> list[Attention | GatedDeltaNet]:
    """Reads the gated delta net or the gated attention of each layer."""
    keys.default(partial_rotary_factor=0.25, head_dim=256)
    keys.require("hidden_act", "silu", "swish", default="silu")  # convolutions have it as well
    interval = keys.take_between("full_attention_interval", 1, default=4)
    full = read_attention(keys, rope=read_rope(keys, partial=True), bias=False, gate=True, qk_norm="head")
    mixers = {LINEAR: GatedDeltaNet(**keys.take_fields(FIELDS)), FULL: full}
    default = [LINEAR if (i + 1) % interval else FULL for i in range(keys.num_layers)]
    return [mixers[kind] for kind in keys.take_kinds("layer_types", mixers, len(default), default)]


def read_shared_mlps(keys: ModelJson) -> list[MLP | MixtureOfExperts]:
    """Reads the MLP or the experts of each layer, beside which there are shared ones with a gate."""
    width = keys.take("moe_intermediate_size", int)
    shared = round(keys.take("shared_expert_intermediate_size", int) / width)
    keys.require("shared_expert_intermediate_size", shared * width)
    return read_mlps(keys, num_shared_experts=shared, shared_gate=True)


def write(model: TransformerConfig) -> dict[str, Any]:
    """Returns the keys of a Qwen3-Next."""
    return write_model(model) | write_mixers(model) | write_shared_mlps(model) | mtp.QWEN.write(model)


def write_mixers(model: TransformerConfig) -> dict[str, Any]:
    """Returns the keys of gated delta nets and gated attention."""
    mixers = [layer.mixer for layer in model.all_layers]
    full = of_kind(next((mixer for mixer in mixers if isinstance(mixer, Attention)), None), Attention, "layers.mixer")
    nets = (mixer for mixer in mixers if isinstance(mixer, GatedDeltaNet))
    return write_fields(of_kind(next(nets, None), GatedDeltaNet, "layers.mixer"), FIELDS) | {
        "attention_bias": full.qkv_bias,
        "layer_types": [FULL if isinstance(mixer, Attention) else LINEAR for mixer in mixers],
        "partial_rotary_factor": 1.0 if full.rope is None else full.rope.fraction,
    }


def write_shared_mlps(model: TransformerConfig) -> dict[str, Any]:
    """Returns the keys of MLPs and experts, with shared ones."""
    experts = experts_of(model)
    return write_mlps(model) | {"shared_expert_intermediate_size": experts.num_shared_experts * experts.dim}


def grouped_projections(mixer: GatedDeltaNet) -> Iterator[Rule]:
    """Yields the rules of a gated delta net's projections; `g` are key heads, each shared by `r` value heads."""
    heads = {"query": "(g {k}) d -> d g k", "key": "(g {k}) d -> d g k"}
    heads |= {each: "(g {r v}) d -> d (g r) v" for each in ("value", "gate")}
    groups = {"g": mixer.num_key_heads}
    parts = ((f"attention.{each}.weight", pattern) for each, pattern in heads.items())
    yield fused("linear_attn.in_proj_qkvz.weight", *parts, **groups)
    parts = ((f"attention.{each}.weight", "(g {r}) d -> d (g r)") for each in ("beta", "decay"))
    yield fused("linear_attn.in_proj_ba.weight", *parts, **groups)


def mixer_rules(
    mixer: Attention | GatedDeltaNet, projections: Callable[[GatedDeltaNet], Iterator[Rule]] = grouped_projections
) -> Iterator[Rule]:
    """Yields the rules of gated attention, or of a gated delta net, whose `projections` differ between families."""
    if not isinstance(mixer, GatedDeltaNet):
        for each in attention_rules(mixer):
            yield _with_gate(each) if "q_proj" in each.theirs else each
        return
    yield from projections(mixer)
    parts = ((f"attention.{each}_conv", "({h k}) 1 w -> w h (k 1)") for each in ("query", "key", "value"))
    yield fused("linear_attn.conv1d.weight", *parts)
    yield rule("linear_attn.A_log", "attention.a_log", "h -> h")
    yield rule("linear_attn.dt_bias", "attention.dt_bias", "h -> h")
    yield rule("linear_attn.norm.weight", "attention.norm.scale", "v -> v")
    yield rule("linear_attn.out_proj.weight", "attention.out.weight", "d (h v) -> h v d")


def _with_gate(query: Rule) -> Rule:
    """Returns the rule of a tensor that holds queries and gates, head by head."""
    part, pattern = query.parts[0], query.parts[0].pattern.replace("(h k)", "(h {k})")
    return fused(query.theirs, (part.ours, pattern), (part.ours.replace("query", "gate"), pattern))


FAMILY = Family(
    model_type="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    read=read,
    write=write,
    mixer_rules=mixer_rules,
    mtp=mtp.QWEN,
)

_experts = MixtureOfExperts(
    dim=512, num_experts=512, top_k=10, num_shared_experts=1, shared_gate=True, balance_loss=0.001
)
_full = Attention(
    num_heads=16, num_kv_heads=2, head_dim=256, gate=True, qk_norm="head", rope=Rope(theta=1e7, fraction=0.25)
)

SHAPES = {
    "qwen3-next-80b-a3b": TransformerConfig(
        vocab_size=151936,
        num_layers=48,
        hidden_size=2048,
        layers=(*(Layer(mixer=GatedDeltaNet(), mlp=_experts),) * 3, Layer(mixer=_full, mlp=_experts)),
        norm=NormConfig(eps=1e-6, offset=1.0),
    )
}
"""Qwen/Qwen3-Next-80B-A3B-Instruct, without modules for multi-token prediction."""
