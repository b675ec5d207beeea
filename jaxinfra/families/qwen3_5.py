"""Qwen3.5 (Qwen team 2026), the text part: the layers of Qwen3-Next with an MLP, and a tensor for each projection.

Vision encoders are not read.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from jaxinfra.families.common import Family, read_model, write_model
from jaxinfra.families.mtp import QWEN
from jaxinfra.families.qwen3_next import mixer_rules, read_mixers, write_mixers
from jaxinfra.interop.config_json import ModelJson
from jaxinfra.interop.rules import Rule, fused, rule
from jaxinfra.models.attention import Attention
from jaxinfra.models.delta_net import GatedDeltaNet
from jaxinfra.models.layers import MLP, FeedForward, NormConfig
from jaxinfra.models.transformer import Layer, TransformerConfig
from jaxinfra.ops.rope import Rope

MTP = replace(QWEN, key="mtp_num_hidden_layers")


def read(keys: ModelJson, mlps: Sequence[FeedForward] | None = None) -> TransformerConfig:
    """Reads the keys of a Qwen3.5; `mlps` as in `read_model`."""
    keys.require("attn_output_gate", True, default=True)
    keys.require("output_gate_type", "swish", default="swish")  # of gated delta nets
    keys.ignore("mamba_ssm_dtype", "mtp_use_dedicated_embeddings")
    return MTP.read(keys, read_model(keys, read_mixers(keys), mlps, norm_offset=1.0))


def write(model: TransformerConfig) -> dict[str, Any]:
    """Returns the keys of a Qwen3.5."""
    return write_model(model) | write_mixers(model) | MTP.write(model) | {"model_type": "qwen3_5_text"}


def projections(_: GatedDeltaNet) -> Iterator[Rule]:
    """Yields the rules of a gated delta net's projections."""
    parts = ((f"attention.{each}.weight", "({h k}) d -> d h k") for each in ("query", "key", "value"))
    yield fused("linear_attn.in_proj_qkv.weight", *parts)
    yield rule("linear_attn.in_proj_z.weight", "attention.gate.weight", "(h v) d -> d h v")
    yield rule("linear_attn.in_proj_b.weight", "attention.beta.weight", "h d -> d h")
    yield rule("linear_attn.in_proj_a.weight", "attention.decay.weight", "h d -> d h")


FAMILY = Family(
    model_type="qwen3_5_text",
    architecture="Qwen3_5ForCausalLM",
    read=read,
    write=write,
    mixer_rules=partial(mixer_rules, projections=projections),
    mtp=MTP,
)

IMAGES: Mapping[str, Any] = {"vision": "model.visual", "other_prefix": ("model.", "model.language_model.")}
"""How models with images differ from other families with images."""

WITH_IMAGES = FAMILY.with_images("qwen3_5", **IMAGES)
"""The models with images and videos: the text part is read, and written as a `qwen3_5_text`."""


def qwen3_5_shape(
    *, heads: int, kv_heads: int, value_heads: int, mlp: FeedForward, tied: bool = False, **options: Any
) -> TransformerConfig:
    """Returns a decoder with gated attention in every fourth layer; `options` are of `TransformerConfig`."""
    rope = Rope(theta=1e7, fraction=0.25)
    full = Attention(num_heads=heads, num_kv_heads=kv_heads, head_dim=256, gate=True, qk_norm="head", rope=rope)
    linear = Layer(mixer=GatedDeltaNet(num_value_heads=value_heads), mlp=mlp)
    return TransformerConfig(
        vocab_size=248320,
        layers=(linear, linear, linear, Layer(mixer=full, mlp=mlp)),
        norm=NormConfig(eps=1e-6, offset=1.0),
        tie_embeddings=tied,
        **options,
    )


SHAPES = {
    "qwen3.5-0.8b": qwen3_5_shape(
        num_layers=24, hidden_size=1024, heads=8, kv_heads=2, value_heads=16, mlp=MLP(dim=3584), tied=True
    ),
    "qwen3.5-9b": qwen3_5_shape(
        num_layers=32, hidden_size=4096, heads=16, kv_heads=4, value_heads=32, mlp=MLP(dim=12288)
    ),
    "qwen3.5-27b": qwen3_5_shape(
        num_layers=64, hidden_size=5120, heads=24, kv_heads=4, value_heads=48, mlp=MLP(dim=17408)
    ),
}
"""The text part of Qwen/Qwen3.5-{0.8B,9B,27B}."""
