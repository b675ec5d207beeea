"""SmolLM3 (Bakouch et al. 2025): a Llama without rotary positions in every fourth layer."""

from dataclasses import replace
from typing import Any

from jaxinfra.families.common import Family, decoder, dense_layers, read_attention, read_mlp, read_model, write_model
from jaxinfra.families.rotary import read_rope
from jaxinfra.families.windows import read_optional_windows, write_windows
from jaxinfra.interop.config_json import ModelJson
from jaxinfra.models.layers import NormConfig
from jaxinfra.models.transformer import TransformerConfig
from jaxinfra.ops.rope import Rope

SHAPES: dict[str, TransformerConfig] = {
    # HuggingFaceTB/SmolLM3-3B
    "smollm3-3b": decoder(
        vocab_size=128256,
        num_layers=36,
        hidden_size=2048,
        num_heads=16,
        num_kv_heads=4,
        mlp=11008,
        rope=Rope(theta=5e6),
        kinds=({}, {}, {}, {"rope": None}),
        norm=NormConfig(eps=1e-6),
        tie_embeddings=True,
    ),
}


def read(keys: ModelJson) -> TransformerConfig:
    """Reads the keys of a SmolLM3."""
    keys.default(tie_word_embeddings=True, num_attention_heads=16, num_key_value_heads=4)
    interval = keys.take_between("no_rope_layer_interval", 1, default=4)
    default = [int((index + 1) % interval > 0) for index in range(keys.num_layers)]
    has_rope = keys.take_kinds("no_rope_layers", (0, 1), len(default), default)
    mixer = read_attention(keys, rope=read_rope(keys, theta=2e6), bias=False)
    mixers = read_optional_windows(keys, mixer, lambda index: not has_rope[index])
    mixers = [each if has_rope[index] else replace(each, rope=None) for index, each in enumerate(mixers)]
    return read_model(keys, mixers, read_mlp(keys, bias=keys.take("mlp_bias", bool, False)))


def write(model: TransformerConfig) -> dict[str, Any]:
    """Returns the keys of a SmolLM3."""
    mixers, mlps = zip(*dense_layers(model), strict=True)
    windows = write_windows(mixers)
    return {
        **write_model(model),
        **windows,
        "use_sliding_window": windows["sliding_window"] is not None,
        "no_rope_layers": [int(mixer.rope is not None) for mixer in mixers],
        "attention_bias": mixers[0].qkv_bias,
        "mlp_bias": mlps[0].bias,
    }


FAMILY = Family(model_type="smollm3", architecture="SmolLM3ForCausalLM", read=read, write=write)
