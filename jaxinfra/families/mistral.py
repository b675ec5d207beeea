"""Mistral 7B (Jiang et al. 2023), Mistral NeMo and Mistral Small, and the text part of Mistral Small 3.1 and 3.2."""

from functools import partial
from typing import Any

from jaxinfra.families.common import Family, decoder, dense_layers, read_attention, read_model, write_model
from jaxinfra.interop.config_json import ModelJson
from jaxinfra.models.transformer import TransformerConfig
from jaxinfra.ops.rope import Rope

# mistralai/Mistral-7B-{v0.1,v0.3}, Mixtral-8x7B-v0.1 and others
mistral_shape = partial(decoder, num_layers=32, hidden_size=4096, num_heads=32, num_kv_heads=8, rope=Rope(theta=1e6))
_larger = partial(mistral_shape, vocab_size=131072, num_layers=40, hidden_size=5120, head_dim=128)

SHAPES: dict[str, TransformerConfig] = {
    "mistral-7b-v0.1": mistral_shape(vocab_size=32000, mlp=14336, window=4096, rope=Rope(theta=10000.0)),
    "mistral-7b-v0.3": mistral_shape(vocab_size=32768, mlp=14336),
    # mistralai/Mistral-Nemo-Base-2407, Mistral-Small-Instruct-2409 and Mistral-Small-24B-Base-2501
    "mistral-nemo-12b": _larger(mlp=14336),
    "mistral-small-22b": mistral_shape(vocab_size=32768, num_layers=56, hidden_size=6144, num_heads=48, mlp=16384),
    "mistral-small-24b": _larger(mlp=32768, rope=Rope(theta=1e8)),
}


def read(keys: ModelJson) -> TransformerConfig:
    """Reads the keys of a Mistral."""
    keys.default(num_key_value_heads=8, sliding_window=4096)
    return read_model(keys, read_attention(keys, window=keys.optional("sliding_window", int)))


def write(model: TransformerConfig) -> dict[str, Any]:
    """Returns the keys of a Mistral."""
    mixer, _ = dense_layers(model)[0]
    return write_model(model) | {"model_type": "mistral", "sliding_window": mixer.window}


FAMILY = Family(model_type="mistral", architecture="MistralForCausalLM", read=read, write=write)

WITH_IMAGES = FAMILY.with_images("mistral3")
"""Mistral Small 3.1 and 3.2: the text part is read, and written as a `mistral`."""
