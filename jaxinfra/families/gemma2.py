"""Gemma 2 (Gemma Team 2024): norms before and after, and a sliding window in every other layer."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from jaxinfra.families.common import Family, decoder, dense_layers, read_attention, read_mlp, read_model, write_model
from jaxinfra.families.windows import read_windows, write_windows
from jaxinfra.interop.config_json import ModelJson
from jaxinfra.models.attention import Attention
from jaxinfra.models.layers import MLP, NormConfig
from jaxinfra.models.transformer import TransformerConfig

geglu = partial(MLP, activation="geglu")
gemma_shape = partial(
    decoder,
    head_dim=256,
    query_scale=256**-0.5,
    norms="both",
    norm=NormConfig(eps=1e-6, offset=1.0),
    tie_embeddings=True,
    scale_embeddings=True,
)
# google/gemma-2-{2b,9b,27b}
_gemma2 = partial(gemma_shape, vocab_size=256000, softcap=50.0, logit_softcap=30.0, kinds=({"window": 4096}, {}))

SHAPES: dict[str, TransformerConfig] = {
    "gemma-2-2b": _gemma2(num_layers=26, hidden_size=2304, num_heads=8, num_kv_heads=4, mlp=geglu(dim=9216)),
    "gemma-2-9b": _gemma2(num_layers=42, hidden_size=3584, num_heads=16, num_kv_heads=8, mlp=geglu(dim=14336)),
    "gemma-2-27b": _gemma2(
        num_layers=46,
        hidden_size=4608,
        num_heads=32,
        num_kv_heads=16,
        head_dim=128,
        query_scale=144**-0.5,  # 144 is hidden_size / num_heads
        mlp=geglu(dim=36864),
    ),
}


def read(keys: ModelJson) -> TransformerConfig:
    """Reads the keys of a Gemma 2."""
    keys.default(head_dim=256, num_key_value_heads=4, sliding_window=4096)
    keys.default(attn_logit_softcapping=50.0, final_logit_softcapping=30.0)
    mixer = read_gemma_attention(keys, softcap=keys.optional("attn_logit_softcapping", float))
    return read_gemma(keys, read_windows(keys, mixer, lambda index: index % 2 == 0))


def read_gemma_attention(keys: ModelJson, **options: Any) -> Attention:
    """Reads the attention of a Gemma 2 or 3; `options` are of `Attention`."""
    scale = keys.take("query_pre_attn_scalar", float, 256.0) ** -0.5
    return read_attention(keys, bias=False, query_scale=scale, **options)


def read_gemma(
    keys: ModelJson, mixers: Sequence[Attention], norm_offset: float = 1.0, output_scale: bool = False
) -> TransformerConfig:
    """Reads the sizes of a Gemma whose layers have these mixers; the others are as in `read_model`."""
    keys.default(tie_word_embeddings=True, hidden_activation="gelu_pytorch_tanh")
    keys.ignore("hidden_act", "cache_implementation")  # hidden_activation counts
    mlp, softcap = read_mlp(keys, "hidden_activation"), keys.optional("final_logit_softcapping", float)
    options: dict[str, Any] = {"scale_embeddings": True, "logit_softcap": softcap}
    options |= {"norm_offset": norm_offset, "output_scale": output_scale}
    return read_model(keys, mixers, mlp, norms="both", **options)


def write(model: TransformerConfig) -> dict[str, Any]:
    """Returns the keys of a Gemma 2."""
    mixer, _ = dense_layers(model)[0]
    return write_gemma(model) | {"attn_logit_softcapping": mixer.softcap}


def write_gemma(model: TransformerConfig) -> dict[str, Any]:
    """Returns the keys that Gemma 2 and 3 share."""
    mixers, _ = zip(*dense_layers(model), strict=True)
    keys, scale = write_model(model), mixers[0].query_scale
    scalar = keys["head_dim"] if scale is None else round(scale**-2, 9)
    return {
        **keys,
        **write_windows(mixers),
        "hidden_activation": keys["hidden_act"],
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "attention_bias": mixers[0].qkv_bias,
        "final_logit_softcapping": model.logit_softcap,
    }


FAMILY = Family(model_type="gemma2", architecture="Gemma2ForCausalLM", read=read, write=write)
