"""Qwen2 (Yang et al. 2024) and Qwen2.5 (Qwen Team 2024): biases on queries, keys and values."""

from functools import partial
from typing import Any

from jaxinfra.families.common import Family, decoder, dense_layers, read_attention, read_model, write_model
from jaxinfra.families.windows import read_optional_windows, write_windows
from jaxinfra.interop.config_json import ModelJson
from jaxinfra.models.attention import Attention
from jaxinfra.models.layers import NormConfig
from jaxinfra.models.transformer import TransformerConfig
from jaxinfra.ops.rope import Rope

# Qwen/Qwen2-{0.5B,1.5B,7B} and Qwen2.5-{0.5B,...,72B}, the base models; the instruct models of 14B and up have an eps
# of 1e-6.
_qwen2 = partial(decoder, qkv_bias=True, rope=Rope(theta=1e6))
_small = partial(_qwen2, vocab_size=151936, norm=NormConfig(eps=1e-6), tie_embeddings=True)
_large = partial(_qwen2, vocab_size=152064)
_0_5B = _small(num_layers=24, hidden_size=896, num_heads=14, num_kv_heads=2, mlp=4864)
_1_5B = _small(num_layers=28, hidden_size=1536, num_heads=12, num_kv_heads=2, mlp=8960)
_7B = _large(num_layers=28, hidden_size=3584, num_heads=28, num_kv_heads=4, mlp=18944, norm=NormConfig(eps=1e-6))

SHAPES: dict[str, TransformerConfig] = {
    "qwen2-0.5b": _0_5B,
    "qwen2-1.5b": _1_5B,
    "qwen2-7b": _7B,
    "qwen2.5-0.5b": _0_5B,
    "qwen2.5-1.5b": _1_5B,
    "qwen2.5-3b": _small(num_layers=36, hidden_size=2048, num_heads=16, num_kv_heads=2, mlp=11008),
    "qwen2.5-7b": _7B,
    "qwen2.5-14b": _large(num_layers=48, hidden_size=5120, num_heads=40, num_kv_heads=8, mlp=13824),
    "qwen2.5-32b": _large(num_layers=64, hidden_size=5120, num_heads=40, num_kv_heads=8, mlp=27648),
    "qwen2.5-72b": _large(num_layers=80, hidden_size=8192, num_heads=64, num_kv_heads=8, mlp=29568),
}


def read(keys: ModelJson) -> TransformerConfig:
    """Reads the keys of a Qwen2."""
    return read_qwen(keys, read_attention(keys, qkv_bias=True))


def read_qwen(keys: ModelJson, mixer: Attention) -> TransformerConfig:
    """Reads windows, MLP and sizes of a Qwen2 or Qwen3; `mixer` is that of layers without a window."""
    first = keys.take("max_window_layers", int, 28)
    return read_model(keys, read_optional_windows(keys, mixer, lambda index: index >= first))


def write(model: TransformerConfig) -> dict[str, Any]:
    """Returns the keys of a Qwen2."""
    mixers, _ = zip(*dense_layers(model), strict=True)
    keys = write_model(model) | {"use_sliding_window": False}
    windows = [mixer.window for mixer in mixers]
    if any(windows):
        first = next(index for index, window in enumerate(windows) if window is not None)
        keys |= {**write_windows(mixers), "use_sliding_window": True, "max_window_layers": first}
    return keys


FAMILY = Family(model_type="qwen2", architecture="Qwen2ForCausalLM", read=read, write=write)
