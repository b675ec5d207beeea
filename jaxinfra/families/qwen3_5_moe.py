"""Qwen3.5 with experts (Qwen team 2026), the text part: weights of chosen experts always sum to one.

Modules for multi-token prediction are not read: published weights have their experts in other tensors than the layers.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from jaxinfra.families.common import write_model
from jaxinfra.families.qwen3_5 import FAMILY as DENSE
from jaxinfra.families.qwen3_5 import IMAGES, qwen3_5_shape
from jaxinfra.families.qwen3_5 import read as read_qwen3_5
from jaxinfra.families.qwen3_next import read_shared_mlps, write_mixers, write_shared_mlps
from jaxinfra.interop.config_json import ModelJson
from jaxinfra.models.moe import MixtureOfExperts
from jaxinfra.models.transformer import TransformerConfig


def read(keys: ModelJson) -> TransformerConfig:
    """Reads the keys of a Qwen3.5 with experts."""
    for name, value in (("norm_topk_prob", True), ("decoder_sparse_step", 1), ("mlp_only_layers", [])):
        keys.require(name, value, default=value)  # transformers does not look at them
    keys.default(norm_topk_prob=True, num_key_value_heads=2, intermediate_size=keys.take("moe_intermediate_size", int))
    return replace(read_qwen3_5(keys, read_shared_mlps(keys)), mtp=None)


def write(model: TransformerConfig) -> dict[str, Any]:
    """Returns the keys of a Qwen3.5 with experts."""
    keys = write_mixers(model) | write_shared_mlps(model)
    return write_model(model) | keys | {"model_type": "qwen3_5_moe_text"}


FAMILY = replace(
    DENSE,
    model_type="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForCausalLM",
    read=read,
    write=write,
    unused=(*DENSE.unused, "mtp.*"),
    mtp=None,
)

WITH_IMAGES = FAMILY.with_images("qwen3_5_moe", **IMAGES)
"""The models with images and videos: the text part is read, and written as a `qwen3_5_moe_text`."""

_experts = partial(MixtureOfExperts, num_shared_experts=1, shared_gate=True, balance_loss=0.001)

SHAPES = {
    "qwen3.5-35b-a3b": qwen3_5_shape(
        num_layers=40,
        hidden_size=2048,
        heads=16,
        kv_heads=2,
        value_heads=32,
        mlp=_experts(dim=512, num_experts=256, top_k=8),
    ),
    "qwen3.5-397b-a17b": qwen3_5_shape(
        num_layers=60,
        hidden_size=4096,
        heads=32,
        kv_heads=2,
        value_heads=64,
        mlp=_experts(dim=1024, num_experts=512, top_k=10),
    ),
}
"""The text part of Qwen/Qwen3.5-{35B-A3B,397B-A17B}."""
