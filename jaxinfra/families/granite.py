"""Granite 3 (Granite Team 2024): a Llama with multipliers on embeddings, scores, residual branches and logits."""

from dataclasses import replace
from typing import Any

from jaxinfra.families import llama
from jaxinfra.families.common import Family, alike, dense_layers, layer_rules, model_rules
from jaxinfra.interop.config_json import ModelJson
from jaxinfra.models.attention import Attention
from jaxinfra.models.layers import MLP
from jaxinfra.models.transformer import TransformerConfig
from jaxinfra.ops.rope import Rope


def _granite(
    hidden_size: int, mlp_dim: int, theta: float, query_scale: float, logits_scaling: float
) -> TransformerConfig:
    """ibm-granite/granite-3.1-{2b,8b}-base."""
    return alike(
        vocab_size=49155,
        num_layers=40,
        hidden_size=hidden_size,
        mixer=Attention(num_heads=32, num_kv_heads=8, rope=Rope(theta=theta), query_scale=query_scale),
        mlp=MLP(dim=mlp_dim),
        tie_embeddings=True,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        logits_scaling=logits_scaling,
    )


SHAPES: dict[str, TransformerConfig] = {
    "granite-3.1-2b": _granite(2048, 8192, theta=5e6, query_scale=1 / 64, logits_scaling=8.0),
    "granite-3.1-8b": _granite(4096, 12800, theta=1e7, query_scale=1 / 128, logits_scaling=16.0),
}

MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
"""Keys that have the same names as fields."""


def read(keys: ModelJson) -> TransformerConfig:
    """Reads the keys of a Granite."""
    scale = keys.take("attention_multiplier", float, 1.0)
    model = llama.read(keys)
    layers = tuple(replace(each, mixer=replace(each.mixer, query_scale=scale)) for each in model.layers)
    return replace(model, layers=layers, **{name: keys.take(name, float, 1.0) for name in MULTIPLIERS})


def write(model: TransformerConfig) -> dict[str, Any]:
    """Returns the keys of a Granite."""
    mixer, _ = dense_layers(model)[0]
    scale = mixer.head_width(model.hidden_size) ** -0.5 if mixer.query_scale is None else mixer.query_scale
    multipliers = {name: getattr(model, name) for name in MULTIPLIERS}
    return llama.write(model) | multipliers | {"attention_multiplier": scale}


FAMILY = Family(
    model_type="granite",
    architecture="GraniteForCausalLM",
    read=read,
    write=write,
    layer_rules=layer_rules,
    model_rules=model_rules,
)
