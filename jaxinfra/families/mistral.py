"""Mistral 7B (Jiang et al. 2023), Mistral NeMo and Mistral Small, and the text part of Mistral Small 3.1 and 3.2."""

from dataclasses import replace
from typing import Any

from jaxinfra.families.common import (
    Family,
    alike,
    dense_layers,
    layer_rules,
    model_rules,
    read_attention,
    read_mlp,
    read_model,
    read_rope,
    read_text_part,
    write_model,
    write_rope,
)
from jaxinfra.interop.config_json import ModelJson
from jaxinfra.models.attention import Attention
from jaxinfra.models.layers import MLP
from jaxinfra.models.moe import MixtureOfExperts
from jaxinfra.models.transformer import Layer, TransformerConfig
from jaxinfra.ops.rope import Rope

MLP_14K = MLP(dim=14336)


def mistral_shape(
    vocab_size: int,
    mlp: MLP | MixtureOfExperts = MLP_14K,
    theta: float = 1e6,
    num_layers: int = 32,
    hidden_size: int = 4096,
    num_heads: int = 32,
    **options: Any,
) -> TransformerConfig:
    """mistralai/Mistral-7B-{v0.1,v0.3}, Mixtral-8x7B-v0.1 and others; `options` are of `Attention`."""
    mixer = Attention(num_heads=num_heads, num_kv_heads=8, rope=Rope(theta=theta), **options)
    return alike(vocab_size=vocab_size, num_layers=num_layers, hidden_size=hidden_size, mixer=mixer, mlp=mlp)


SHAPES: dict[str, TransformerConfig] = {
    "mistral-7b-v0.1": mistral_shape(32000, window=4096, theta=10000.0),
    "mistral-7b-v0.3": mistral_shape(32768),
    # mistralai/Mistral-Nemo-Base-2407, Mistral-Small-Instruct-2409 and Mistral-Small-24B-Base-2501
    "mistral-nemo-12b": mistral_shape(131072, num_layers=40, hidden_size=5120, head_dim=128),
    "mistral-small-22b": mistral_shape(32768, MLP(dim=16384), num_layers=56, hidden_size=6144, num_heads=48),
    "mistral-small-24b": mistral_shape(
        131072, MLP(dim=32768), theta=1e8, num_layers=40, hidden_size=5120, head_dim=128
    ),
}


def read(keys: ModelJson) -> TransformerConfig:
    """Reads the keys of a Mistral."""
    keys.default(num_key_value_heads=8, sliding_window=4096)
    mixer = read_attention(keys, rope=read_rope(keys), window=keys.optional("sliding_window", int))
    return read_model(keys, [Layer(mixer=mixer, mlp=read_mlp(keys))])


def write(model: TransformerConfig) -> dict[str, Any]:
    """Returns the keys of a Mistral."""
    mixer, _ = dense_layers(model)[0]
    own = {"model_type": "mistral", "sliding_window": mixer.window}
    return write_model(model) | write_rope(mixer.rope) | own


FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    read=read,
    write=write,
    layer_rules=layer_rules,
    model_rules=model_rules,
)

WITH_IMAGES = replace(
    FAMILY,
    model_type="mistral3",
    read=lambda keys: read_text_part(keys, read),
    other_prefix=("", "language_model."),
    unused=(*FAMILY.unused, "vision_tower.*", "multi_modal_projector.*"),
)
"""Mistral Small 3.1 and 3.2: the text part is read, and written as a `mistral`."""
