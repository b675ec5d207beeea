"""Gemma 3 (Gemma Team 2025): norms on queries and keys, and five layers with a window for each layer without.

Of the models with images the text part is read.
"""

from functools import partial
from typing import Any

from jaxinfra.families.common import Family, dense_layers
from jaxinfra.families.gemma2 import geglu, gemma_shape, read_gemma, read_gemma_attention, write_gemma
from jaxinfra.families.windows import read_two_ropes, read_windows
from jaxinfra.interop.config_json import ModelJson
from jaxinfra.models.transformer import TransformerConfig
from jaxinfra.ops.rope import LinearScaling, Rope

BY_8 = Rope(theta=1e6, scaling=LinearScaling(factor=8.0))


def _kinds(window: int) -> tuple[dict[str, Any], ...]:
    return (*[{"window": window, "rope": Rope(theta=10000.0)}] * 5, {})


# google/gemma-3-1b-pt, and the text part (`text_config`) of google/gemma-3-{4b,12b,27b}-pt
_gemma3 = partial(gemma_shape, vocab_size=262208, qk_norm="head", rope=BY_8, kinds=_kinds(1024))

SHAPES: dict[str, TransformerConfig] = {
    "gemma-3-1b": _gemma3(
        num_layers=26,
        hidden_size=1152,
        num_heads=4,
        num_kv_heads=1,
        mlp=geglu(dim=6912),
        kinds=_kinds(512),
        vocab_size=262144,
        rope=Rope(theta=1e6),
    ),
    "gemma-3-4b": _gemma3(num_layers=34, hidden_size=2560, num_heads=8, num_kv_heads=4, mlp=geglu(dim=10240)),
    "gemma-3-12b": _gemma3(num_layers=48, hidden_size=3840, num_heads=16, num_kv_heads=8, mlp=geglu(dim=15360)),
    "gemma-3-27b": _gemma3(
        num_layers=62,
        hidden_size=5376,
        num_heads=32,
        num_kv_heads=16,
        head_dim=128,
        query_scale=168**-0.5,
        mlp=geglu(dim=21504),
    ),
}


def read(keys: ModelJson) -> TransformerConfig:
    """Reads the keys of a Gemma 3."""
    # The defaults of Gemma3TextConfig in transformers; published models with images leave these keys out.
    keys.default(vocab_size=262208, num_attention_heads=8, num_key_value_heads=4, head_dim=256, sliding_window=4096)
    keys.require("attn_logit_softcapping", None)
    pattern = keys.take_between("_sliding_window_pattern", 1, default=6)
    pattern = keys.take_between("sliding_window_pattern", 1, default=pattern)
    local = Rope(theta=keys.take("rope_local_base_freq", float, 10000.0))
    rope, sliding_rope = read_two_ropes(keys, 1e6, lambda full: local)
    mixer = read_gemma_attention(keys, rope=rope, qk_norm="head")
    return read_gemma(keys, read_windows(keys, mixer, lambda index: (index + 1) % pattern > 0, sliding_rope))


def write(model: TransformerConfig) -> dict[str, Any]:
    """Returns the keys of a Gemma 3."""
    mixers = [mixer for mixer, _ in dense_layers(model)]
    local = next((mixer.rope for mixer in mixers if mixer.window is not None), mixers[0].rope)
    keys = write_gemma(model) | {"model_type": "gemma3_text"}
    return keys | ({} if local is None else {"rope_local_base_freq": local.theta})


FAMILY = Family(
    model_type="gemma3_text", architecture="Gemma3ForCausalLM", read=read, write=write, max_positions=131072
)

WITH_IMAGES = FAMILY.with_images("gemma3")
"""The models with images: the text part is read, and written as a `gemma3_text`."""
