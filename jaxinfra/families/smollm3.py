"""SmolLM3 (Bakouch et al. 2025): a Llama without rotary positions in every fourth layer."""

from dataclasses import replace
from typing import Any

from jaxinfra.families.common import Family, dense_layers, read_attention, read_mlp, read_model, read_rope, write_model
from jaxinfra.families.windows import read_optional_windows, write_windows
from jaxinfra.interop.config_json import ModelJson
from jaxinfra.models.attention import Attention
from jaxinfra.models.layers import MLP, NormConfig
from jaxinfra.models.transformer import Layer, TransformerConfig
from jaxinfra.ops.rope import Rope

_MIXER = Attention(num_heads=16, num_kv_heads=4, rope=Rope(theta=5e6))

SHAPES: dict[str, TransformerConfig] = {
    # HuggingFaceTB/SmolLM3-3B
    "smollm3-3b": TransformerConfig(
        vocab_size=128256,
        num_layers=36,
        hidden_size=2048,
        layers=tuple(Layer(mixer=mixer, mlp=MLP(dim=11008)) for mixer in (*[_MIXER] * 3, replace(_MIXER, rope=None))),
        norm=NormConfig(eps=1e-6),
        tie_embeddings=True,
    ),
}


def read(keys: ModelJson) -> TransformerConfig:
    """Reads the keys of a SmolLM3."""
    keys.default(tie_word_embeddings=True, num_attention_heads=16, num_key_value_heads=4)
    bias, interval = keys.take("attention_bias", bool, False), keys.take_between("no_rope_layer_interval", 1, default=4)
    default = [int((index + 1) % interval != 0) for index in range(keys.num_layers)]
    has_rope = keys.take_kinds("no_rope_layers", (0, 1), len(default), default)
    windows = read_optional_windows(keys, lambda index: not has_rope[index])
    mixer = read_attention(keys, rope=read_rope(keys, theta=2e6), qkv_bias=bias, out_bias=bias)
    mlp = read_mlp(keys, bias=keys.take("mlp_bias", bool, False))
    mixers = [
        replace(mixer, rope=mixer.rope if rotated else None, window=window)
        for rotated, window in zip(has_rope, windows, strict=True)
    ]
    return read_model(keys, [Layer(mixer=mixer, mlp=mlp) for mixer in mixers])


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
