"""Experts as DeepSeek V3 publishes them, and GLM-4.5: sigmoid scores, biases on choices, shared experts."""

from collections.abc import Mapping
from typing import Any

from jaxinfra.families.common import Fields, experts_of, of_kind, read_activation, read_fields, read_mlp, write_fields
from jaxinfra.interop.config_json import ModelJson
from jaxinfra.models.attention import Attention
from jaxinfra.models.latent import LatentAttention
from jaxinfra.models.layers import MLP
from jaxinfra.models.moe import MixtureOfExperts
from jaxinfra.models.transformer import Layer, TransformerConfig

FIELDS: Fields = {
    "dim": ("moe_intermediate_size", int),
    "num_experts": ("n_routed_experts", int),
    "top_k": ("num_experts_per_tok", int),
    "num_shared_experts": ("n_shared_experts", int),
    "score_function": ("scoring_func", str),
    "normalize_weights": ("norm_topk_prob", bool),
    "routed_scaling_factor": ("routed_scaling_factor", float),
    "num_groups": ("n_group", int),
    "top_k_groups": ("topk_group", int),
}

BALANCE: Mapping[str, Any] = {"bias_update_rate": 0.001, "balance_loss": 0.0001}
"""How load is balanced in training: DeepSeek-AI 2024, "DeepSeek-V3", section 4.2; GLM-4.5 does the same."""


def read_layers(keys: ModelJson, mixer: Attention | LatentAttention) -> list[Layer]:
    """Reads MLPs and experts; the first layers have no experts."""
    keys.default(hidden_act="silu", scoring_func="sigmoid")
    keys.default(n_shared_experts=1, num_experts_per_tok=8, norm_topk_prob=True)
    for name, value in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc"), ("moe_layer_freq", 1)):
        keys.require(name, value, default=value)
    keys.ignore("ep_size", "seq_aux", "aux_loss_alpha", "num_nextn_predict_layers", "num_mtp_layers")
    experts = MixtureOfExperts(activation=read_activation(keys), **read_fields(keys, FIELDS), **BALANCE)
    dense, mlp = keys.take_between("first_k_dense_replace", 0), read_mlp(keys)
    return [Layer(mixer=mixer, mlp=mlp if i < dense else experts) for i in range(keys.num_layers)]


def write_layers(model: TransformerConfig) -> dict[str, Any]:
    """Returns the keys of MLPs and experts."""
    experts, dense = experts_of(model), [of_kind(layer.mlp, MLP, "first_layers.mlp") for layer in model.first_layers]
    return write_fields(experts, FIELDS) | {
        "intermediate_size": dense[0].dim if dense else experts.dim,
        "first_k_dense_replace": len(dense),
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 0,
    }
