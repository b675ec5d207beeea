"""Llama 2, 3, 3.1 and 3.2 (Touvron et al. 2023; Llama Team 2024), and SmolLM2.

The rotated features of published weights are in two halves, as here.
"""

from typing import Any

from jaxinfra.interop.config_json import ModelJson
from jaxinfra.models.attention import Attention
from jaxinfra.models.families.common import (
    Family,
    layer_rules,
    model_rules,
    read_attention,
    read_mlp,
    read_model,
    read_rope,
    write_model,
    write_rope,
)
from jaxinfra.models.layers import MLP
from jaxinfra.models.transformer import Layer, TransformerConfig


def read(keys: ModelJson) -> TransformerConfig:
    """Reads the keys of a Llama."""
    bias = keys.take("attention_bias", bool, False)
    mixer = read_attention(keys, rope=read_rope(keys), qkv_bias=bias, out_bias=bias)
    mlp = read_mlp(keys, bias=keys.take("mlp_bias", bool, False))
    return read_model(keys, [Layer(mixer=mixer, mlp=mlp)])


def write(model: TransformerConfig) -> dict[str, Any]:
    """Returns the keys of a Llama."""
    mixer, mlp = model.layers[0].mixer, model.layers[0].mlp
    assert isinstance(mixer, Attention) and isinstance(mlp, MLP) and mixer.rope is not None
    return write_model(model) | write_rope(mixer.rope) | {"attention_bias": mixer.qkv_bias, "mlp_bias": mlp.bias}


FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    read=read,
    write=write,
    layer_rules=layer_rules,
    model_rules=model_rules,
)
