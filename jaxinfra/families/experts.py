"""Experts in `config.json`: sizes by their keys, and those that DeepSeek V3 and GLM-4.5 publish in the same way."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from jaxinfra.families.common import of_kind, read_activation, read_mlp
from jaxinfra.interop.config_json import Fields, ModelJson, write_fields
from jaxinfra.models.layers import MLP
from jaxinfra.models.mixer import Mixer
from jaxinfra.models.moe import MixtureOfExperts
from jaxinfra.models.transformer import Layer, TransformerConfig

EXPERT_FIELDS: Fields = {
    "dim": ("intermediate_size", int),
    "num_experts": ("num_local_experts", int),
    "top_k": ("num_experts_per_tok", int),
}
"""Fields of `MixtureOfExperts` in families whose `intermediate_size` is the width of an expert."""

ROUTED_FIELDS: Fields = {
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
"""Fields of DeepSeek V3 and GLM-4.5: sigmoid scores, biases on choices, shared experts."""

BALANCE: Mapping[str, Any] = {"bias_update_rate": 0.001, "balance_loss": 0.0001}
"""How load is balanced in training: DeepSeek-AI 2024, "DeepSeek-V3", section 4.2; GLM-4.5 does the same."""

routed_experts = partial(MixtureOfExperts, top_k=8, num_shared_experts=1, score_function="sigmoid", **BALANCE)


def routed_shape(
    *, mixer: Mixer, experts: MixtureOfExperts, num_dense: int, mlp_dim: int, **options: Any
) -> TransformerConfig:
    """Returns a decoder whose first layers have an MLP in place of experts; `options` are of `TransformerConfig`."""
    dense, sparse = Layer(mixer=mixer, mlp=MLP(dim=mlp_dim)), Layer(mixer=mixer, mlp=experts)
    return TransformerConfig(first_layers=(dense,) * num_dense, layers=(sparse,), **options)


def experts_of(model: TransformerConfig) -> MixtureOfExperts:
    """Returns the experts of the first layer with some; raises ConfigError if there is none."""
    found = (layer.mlp for layer in model.all_layers if isinstance(layer.mlp, MixtureOfExperts))
    return of_kind(next(found, None), MixtureOfExperts, "layers.mlp")


def read_experts(keys: ModelJson, fields: Fields = EXPERT_FIELDS, **options: Any) -> MixtureOfExperts:
    """Reads fields and the activation of experts; `options` are of `MixtureOfExperts`."""
    return MixtureOfExperts(activation=read_activation(keys), **keys.take_fields(fields), **options)


def read_routed(keys: ModelJson) -> list[MLP | MixtureOfExperts]:
    """Reads the MLP or the experts of each layer of a DeepSeek V3 or GLM-4.5; the first layers have no experts."""
    keys.default(scoring_func="sigmoid", n_shared_experts=1, num_experts_per_tok=8, norm_topk_prob=True)
    for name, value in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc"), ("moe_layer_freq", 1)):
        keys.require(name, value, default=value)
    keys.ignore("ep_size", "seq_aux", "aux_loss_alpha", "num_mtp_layers")
    experts, mlp = read_experts(keys, ROUTED_FIELDS, **BALANCE), read_mlp(keys)
    dense = keys.take_between("first_k_dense_replace", 0)
    return [mlp if i < dense else experts for i in range(keys.num_layers)]


def write_routed(model: TransformerConfig) -> dict[str, Any]:
    """Returns the keys of MLPs and experts of a DeepSeek V3 or GLM-4.5."""
    experts, dense = experts_of(model), [of_kind(layer.mlp, MLP, "first_layers.mlp") for layer in model.first_layers]
    return write_fields(experts, ROUTED_FIELDS) | {
        "intermediate_size": dense[0].dim if dense else experts.dim,
        "first_k_dense_replace": len(dense),
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": model.mtp_depths,
    }
