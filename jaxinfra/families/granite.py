"""Granite 3 (Granite Team 2024): a Llama with multipliers on embeddings, scores, residual branches and logits."""

from dataclasses import replace
from functools import partial
from typing import Any

from jaxinfra.families import llama
from jaxinfra.families.common import Family, decoder, dense_layers
from jaxinfra.interop.config_json import ModelJson
from jaxinfra.models.transformer import TransformerConfig
from jaxinfra.ops.rope import Rope

# ibm-granite/granite-3.1-{2b,8b}-base
_granite = partial(
    decoder,
    vocab_size=49155,
    num_layers=40,
    num_heads=32,
    num_kv_heads=8,
    tie_embeddings=True,
    embedding_multiplier=12.0,
    residual_multiplier=0.22,
)

SHAPES: dict[str, TransformerConfig] = {
    "granite-3.1-2b": _granite(
        hidden_size=2048, mlp=8192, rope=Rope(theta=5e6), query_scale=1 / 64, logits_scaling=8.0
    ),
    "granite-3.1-8b": _granite(
        hidden_size=4096, mlp=12800, rope=Rope(theta=1e7), query_scale=1 / 128, logits_scaling=16.0
    ),
}

MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
"""Keys that have the same names as fields."""


def read(keys: ModelJson) -> TransformerConfig:
    """Reads the keys of a Granite."""
    model = llama.read(keys, query_scale=keys.take("attention_multiplier", float, 1.0))
    return replace(model, **{name: keys.take(name, float, 1.0) for name in MULTIPLIERS})


def write(model: TransformerConfig) -> dict[str, Any]:
    """Returns the keys of a Granite."""
    mixer, _ = dense_layers(model)[0]
    scale = mixer.head_width(model.hidden_size) ** -0.5 if mixer.query_scale is None else mixer.query_scale
    multipliers = {name: getattr(model, name) for name in MULTIPLIERS}
    return llama.write(model) | multipliers | {"attention_multiplier": scale}


FAMILY = Family(model_type="granite", architecture="GraniteForCausalLM", read=read, write=write)
