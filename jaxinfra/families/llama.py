"""Llama 2, 3, 3.1 and 3.2 (Touvron et al. 2023; Llama Team 2024), and SmolLM2.

The rotated features of published weights are in two halves, as here.
"""

from functools import partial
from typing import Any

from jaxinfra.families.common import Family, decoder, dense_layers, read_attention, read_mlp, read_model, write_model
from jaxinfra.interop.config_json import ModelJson
from jaxinfra.models.transformer import TransformerConfig
from jaxinfra.ops.rope import Llama3Scaling, Rope

_llama = partial(decoder, num_kv_heads=8)
# meta-llama/Llama-2-{7b,13b,70b}-hf and Meta-Llama-3-{8B,70B}
_llama2 = partial(_llama, vocab_size=32000, rope=Rope(theta=10000.0))
_llama3 = partial(_llama, vocab_size=128256, rope=Rope(theta=500000.0))
# meta-llama/Llama-3.1-{8B,70B,405B} and Llama-3.2-{1B,3B}
_llama3_1 = partial(_llama3, rope=Rope(theta=500000.0, scaling=Llama3Scaling(factor=8.0)))
_llama3_2 = partial(_llama3, rope=Rope(theta=500000.0, scaling=Llama3Scaling(factor=32.0)), tie_embeddings=True)
# HuggingFaceTB/SmolLM2-{135M,360M,1.7B}
_smollm2 = partial(_llama, vocab_size=49152, rope=Rope(theta=100000.0), tie_embeddings=True)

SHAPES: dict[str, TransformerConfig] = {
    "llama-2-7b": _llama2(num_layers=32, hidden_size=4096, num_heads=32, num_kv_heads=32, mlp=11008),
    "llama-2-13b": _llama2(num_layers=40, hidden_size=5120, num_heads=40, num_kv_heads=40, mlp=13824),
    "llama-2-70b": _llama2(num_layers=80, hidden_size=8192, num_heads=64, mlp=28672),
    "llama-3-8b": _llama3(num_layers=32, hidden_size=4096, num_heads=32, mlp=14336),
    "llama-3-70b": _llama3(num_layers=80, hidden_size=8192, num_heads=64, mlp=28672),
    "llama-3.1-8b": _llama3_1(num_layers=32, hidden_size=4096, num_heads=32, mlp=14336),
    "llama-3.1-70b": _llama3_1(num_layers=80, hidden_size=8192, num_heads=64, mlp=28672),
    "llama-3.1-405b": _llama3_1(num_layers=126, hidden_size=16384, num_heads=128, mlp=53248),
    "llama-3.2-1b": _llama3_2(num_layers=16, hidden_size=2048, num_heads=32, mlp=8192),
    "llama-3.2-3b": _llama3_2(num_layers=28, hidden_size=3072, num_heads=24, mlp=8192),
    "smollm2-135m": _smollm2(num_layers=30, hidden_size=576, num_heads=9, num_kv_heads=3, mlp=1536),
    "smollm2-360m": _smollm2(num_layers=32, hidden_size=960, num_heads=15, num_kv_heads=5, mlp=2560),
    "smollm2-1.7b": _smollm2(
        num_layers=24, hidden_size=2048, num_heads=32, num_kv_heads=32, mlp=8192, rope=Rope(theta=130000.0)
    ),
}


def read(keys: ModelJson, **options: Any) -> TransformerConfig:
    """Reads the keys of a Llama; `options` are of `Attention`."""
    keys.require("rope_interleaved", False, default=False)
    keys.ignore("is_llama_config", "transformers.js_config")  # of SmolLM2
    mlp = read_mlp(keys, bias=keys.take("mlp_bias", bool, False))
    return read_model(keys, read_attention(keys, bias=False, **options), mlp)


def write(model: TransformerConfig) -> dict[str, Any]:
    """Returns the keys of a Llama."""
    mixer, mlp = dense_layers(model)[0]
    return write_model(model) | {"attention_bias": mixer.qkv_bias, "mlp_bias": mlp.bias}


FAMILY = Family(model_type="llama", architecture="LlamaForCausalLM", read=read, write=write)
