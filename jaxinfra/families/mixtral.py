"""Mixtral (Jiang et al. 2024): Mistral's attention, and eight experts in place of each MLP."""

from collections.abc import Iterator
from typing import Any

from jaxinfra.families.common import Family, attention_of, read_attention, read_model, write_model
from jaxinfra.families.experts import EXPERT_FIELDS, experts_of, read_experts
from jaxinfra.families.mistral import mistral_shape
from jaxinfra.families.rotary import read_rope
from jaxinfra.interop.config_json import Fields, ModelJson, write_fields
from jaxinfra.interop.rules import Rule, rule
from jaxinfra.models.moe import MixtureOfExperts
from jaxinfra.models.transformer import TransformerConfig

FIELDS: Fields = {**EXPERT_FIELDS, "balance_loss": ("router_aux_loss_coef", float)}


def read(keys: ModelJson) -> TransformerConfig:
    """Reads the keys of a Mixtral."""
    keys.default(rms_norm_eps=1e-5, router_aux_loss_coef=0.001, num_key_value_heads=8)
    keys.default(num_local_experts=8, num_experts_per_tok=2)
    keys.ignore("router_jitter_noise")  # in training
    mixer = read_attention(keys, rope=read_rope(keys, theta=1e6), window=keys.optional("sliding_window", int))
    return read_model(keys, mixer, read_experts(keys, FIELDS))


def write(model: TransformerConfig) -> dict[str, Any]:
    """Returns the keys of a Mixtral."""
    keys = write_fields(experts_of(model), FIELDS) | {"sliding_window": attention_of(model)[0].window}
    return write_model(model) | keys


def experts_rules(mlp: MixtureOfExperts) -> Iterator[Rule]:
    """Yields the rules of a router and of experts."""
    yield rule("block_sparse_moe.gate.weight", "mlp.router", "e d -> d e")
    for theirs, ours in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
        yield rule(f"block_sparse_moe.experts.{{e}}.{theirs}.weight", f"mlp.{ours}", "o i -> e i o")


FAMILY = Family(
    model_type="mixtral", architecture="MixtralForCausalLM", read=read, write=write, mlp_rules=experts_rules
)

_experts = MixtureOfExperts(dim=14336, num_experts=8, top_k=2, balance_loss=0.02)
SHAPES = {"mixtral-8x7b": mistral_shape(vocab_size=32000, mlp=_experts)}
"""mistralai/Mixtral-8x7B-v0.1."""
