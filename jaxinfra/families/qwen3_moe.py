"""Qwen3-30B-A3B and Qwen3-235B-A22B (Qwen team 2025): Qwen3's attention, and experts in place of MLPs."""

from functools import partial
from typing import Any

from jaxinfra.families.common import Family, attention_of, read_attention, read_mlp, read_model, write_model
from jaxinfra.families.experts import experts_of, read_experts
from jaxinfra.families.qwen3 import qwen3_shape
from jaxinfra.interop.config_json import Fields, ModelJson, write_fields
from jaxinfra.models.layers import MLP
from jaxinfra.models.moe import MixtureOfExperts
from jaxinfra.models.transformer import TransformerConfig

FIELDS: Fields = {
    "dim": ("moe_intermediate_size", int),
    "num_experts": ("num_experts", int),
    "top_k": ("num_experts_per_tok", int),
    "normalize_weights": ("norm_topk_prob", bool),
    "balance_loss": ("router_aux_loss_coef", float),
}


def read(keys: ModelJson) -> TransformerConfig:
    """Reads the keys of a Qwen3 with experts."""
    keys.default(norm_topk_prob=False, num_key_value_heads=4)
    window = keys.optional("sliding_window", int)
    window = window if keys.take("use_sliding_window", bool, False) else None
    keys.ignore("max_window_layers")
    return read_model(keys, read_attention(keys, bias=False, window=window, qk_norm="head"), read_mlps(keys))


def read_mlps(keys: ModelJson, **options: Any) -> list[MLP | MixtureOfExperts]:
    """Reads the MLP or the experts of each layer; `options` are of `MixtureOfExperts`."""
    keys.default(router_aux_loss_coef=0.001)
    if "num_local_experts" in keys:  # from transformers 5
        keys.default(num_experts=keys.take("num_local_experts", int))
    step = keys.take_between("decoder_sparse_step", 1, default=1)
    only_dense = keys.take_indices("mlp_only_layers", keys.num_layers)
    experts, dense = read_experts(keys, FIELDS, **options), read_mlp(keys)
    return [dense if i in only_dense or (i + 1) % step else experts for i in range(keys.num_layers)]


def write(model: TransformerConfig) -> dict[str, Any]:
    """Returns the keys of a Qwen3 with experts."""
    mixer = attention_of(model)[0]
    keys = {"attention_bias": mixer.qkv_bias, "use_sliding_window": mixer.window is not None}
    return write_model(model) | keys | {"sliding_window": mixer.window} | write_mlps(model)


def write_mlps(model: TransformerConfig) -> dict[str, Any]:
    """Returns the keys of MLPs and experts."""
    experts, mlps = experts_of(model), [layer.mlp for layer in model.all_layers]
    return write_fields(experts, FIELDS) | {
        "intermediate_size": next((mlp.dim for mlp in mlps if isinstance(mlp, MLP)), experts.dim * experts.top_k),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, mlp in enumerate(mlps) if isinstance(mlp, MLP)],
    }


FAMILY = Family(model_type="qwen3_moe", architecture="Qwen3MoeForCausalLM", read=read, write=write)


_experts = partial(MixtureOfExperts, num_experts=128, top_k=8, balance_loss=0.001)
_shape = partial(qwen3_shape, num_kv_heads=4)

SHAPES = {
    "qwen3-30b-a3b": _shape(num_layers=48, hidden_size=2048, num_heads=32, mlp=_experts(dim=768)),
    "qwen3-235b-a22b": _shape(num_layers=94, hidden_size=4096, num_heads=64, mlp=_experts(dim=1536)),
}
"""Qwen/Qwen3-30B-A3B and Qwen3-235B-A22B."""
