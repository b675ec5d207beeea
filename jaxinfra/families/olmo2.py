"""OLMo 2 (OLMo Team 2024): norms after attention and MLP only, and over all heads of queries and keys at once."""

from functools import partial
from typing import Any

from jaxinfra.families.common import Family, decoder, dense_layers, read_attention, read_model, write_model
from jaxinfra.interop.config_json import ModelJson
from jaxinfra.models.layers import NormConfig
from jaxinfra.models.transformer import TransformerConfig
from jaxinfra.ops.rope import Rope

olmo_shape = partial(decoder, qk_norm="all", norms="after", norm=NormConfig(eps=1e-6), rope=Rope(theta=500000.0))
# allenai/OLMo-2-{0425-1B,1124-7B,1124-13B,0325-32B}
_olmo2 = partial(olmo_shape, vocab_size=100352)

SHAPES: dict[str, TransformerConfig] = {
    "olmo-2-1b": _olmo2(num_layers=16, hidden_size=2048, num_heads=16, num_kv_heads=16, mlp=8192),
    "olmo-2-7b": _olmo2(num_layers=32, hidden_size=4096, num_heads=32, num_kv_heads=32, mlp=11008),
    "olmo-2-13b": _olmo2(num_layers=40, hidden_size=5120, num_heads=40, num_kv_heads=40, mlp=13824),
    "olmo-2-32b": _olmo2(num_layers=64, hidden_size=5120, num_heads=40, num_kv_heads=8, mlp=27648),
}


def read(keys: ModelJson) -> TransformerConfig:
    """Reads the keys of an OLMo 2."""
    keys.default(rms_norm_eps=1e-5)
    return read_model(keys, read_attention(keys, bias=False, qk_norm="all"), norms="after")


def write(model: TransformerConfig) -> dict[str, Any]:
    """Returns the keys of an OLMo 2."""
    mixer, _ = dense_layers(model)[0]
    return write_model(model) | {"attention_bias": mixer.qkv_bias}


FAMILY = Family(model_type="olmo2", architecture="Olmo2ForCausalLM", read=read, write=write)
