"""Gemma 4 (Gemma Team 2026), the text part of its dense models: wider heads with fewer keys in layers without a window.

In these layers values may be keys, and positions rotate a quarter of the pairs of a head. Every layer multiplies its
output by a number. Of models with images the text part is read. Refused are embeddings for each layer and layers that
share keys and values (E2B, E4B), and experts beside an MLP (26B-A4B).
"""

from dataclasses import replace
from typing import Any

from jaxinfra.families.common import Family, dense_layers, write_model
from jaxinfra.families.common import read_attention as read_heads
from jaxinfra.families.gemma2 import geglu, read_gemma
from jaxinfra.families.rotary import write_rope
from jaxinfra.families.windows import FULL, SLIDING, read_two_ropes, read_windows, write_windows
from jaxinfra.interop.config_json import ModelJson
from jaxinfra.models.attention import Attention
from jaxinfra.models.layers import NormConfig
from jaxinfra.models.transformer import Layer, TransformerConfig
from jaxinfra.ops.rope import Rope

FULL_ROPE, SLIDING_ROPE = Rope(theta=1e6, fraction=0.25, proportional=True), Rope()


def read(keys: ModelJson) -> TransformerConfig:
    """Reads the keys of a Gemma 4."""
    keys.require("hidden_size_per_layer_input", 0, default=256)
    keys.require("num_kv_shared_layers", 0, default=0)
    keys.require("enable_moe_block", False, default=False)
    keys.require("use_bidirectional_attention", None, "vision")  # tokens of a text never see later ones
    keys.ignore("vocab_size_per_layer_input", "use_double_wide_mlp", "num_experts", "top_k_experts")
    keys.ignore("moe_intermediate_size")
    keys.default(head_dim=256, global_head_dim=512, num_key_value_heads=4, sliding_window=512)
    keys.default(rope_parameters={FULL: _write_rope(FULL_ROPE), SLIDING: _write_rope(SLIDING_ROPE)})
    full_rope, rope = read_two_ropes(keys, 1e6, lambda full: SLIDING_ROPE)
    norms: dict[str, Any] = {"query_scale": 1.0, "qk_norm": "head", "value_norm": True}
    local = read_heads(keys, rope=rope, bias=False, **norms)
    share = keys.take("attention_k_eq_v", bool, False)
    full = replace(local, rope=full_rope, share_kv=share)
    windowed = read_windows(keys, local, lambda index: (index + 1) % 6 > 0)
    mixers = [full if mixer.window is None else mixer for mixer in windowed[:-1]]
    mixers = _read_overrides(keys, [*mixers, full], share)  # the last layer has no window, whatever `layer_types` says
    return read_gemma(keys, mixers, norm_offset=0.0, output_scale=True)


def _read_overrides(keys: ModelJson, mixers: list[Attention], share: bool) -> list[Attention]:
    """Reads the heads of layers without a window: for all of them, or as transformers writes it, for each layer."""
    kv_heads = keys.optional("num_global_key_value_heads", int) if share else None
    wide = {"head_dim": keys.take("global_head_dim", int), "num_key_value_heads": kv_heads}
    keys.default(per_layer_config={str(i): wide for i, mixer in enumerate(mixers) if mixer.window is None})
    layers, found = keys.part("per_layer_config"), list[Attention]()
    for index, mixer in enumerate(mixers):
        own = layers.part(str(index)) if str(index) in layers else ModelJson({})
        head_dim = own.take("head_dim", int, mixer.head_dim)
        found.append(
            replace(mixer, head_dim=head_dim, num_kv_heads=own.take("num_key_value_heads", int, mixer.num_kv_heads))
        )
        own.close()
    layers.close()
    return found


def write(model: TransformerConfig) -> dict[str, Any]:
    """Returns the keys of a Gemma 4."""
    mixers = [mixer for mixer, _ in dense_layers(model)]
    full, keys = mixers[-1], write_model(model)
    local = next((mixer for mixer in mixers if mixer.window is not None), full)
    for name in ("rope_theta", "rope_scaling", "partial_rotary_factor"):
        keys.pop(name, None)
    return {
        **keys,
        **write_windows(mixers),
        "model_type": "gemma4_text",
        "hidden_activation": keys["hidden_act"],
        "final_logit_softcapping": model.logit_softcap,
        "attention_bias": full.qkv_bias,
        "head_dim": local.head_width(model.hidden_size),
        "global_head_dim": full.head_width(model.hidden_size),
        "num_key_value_heads": local.kv_head_count,
        "num_global_key_value_heads": full.kv_head_count,
        "attention_k_eq_v": full.share_kv,
        "rope_parameters": {FULL: _write_rope(full.rope), SLIDING: _write_rope(local.rope)},
        "hidden_size_per_layer_input": 0,
    }


def _write_rope(rope: Rope | None) -> dict[str, Any]:
    """Returns the keys of rotary positions in one object, as in transformers 5."""
    keys = write_rope(rope)
    return {"rope_type": "default"} | keys.pop("rope_scaling", {}) | keys


FAMILY = Family(
    model_type="gemma4_text", architecture="Gemma4ForCausalLM", read=read, write=write, max_positions=131072
)

WITH_IMAGES = FAMILY.with_images("gemma4", "model.vision_tower", ("model.", "model.language_model."))
"""The models with images: the text part is read, and written as a `gemma4_text`."""

_sliding = Attention(
    num_heads=32,
    num_kv_heads=16,
    head_dim=256,
    rope=SLIDING_ROPE,
    window=1024,
    query_scale=1.0,
    qk_norm="head",
    value_norm=True,
)
_full = replace(_sliding, num_kv_heads=4, head_dim=512, rope=FULL_ROPE, window=None, share_kv=True)

SHAPES = {
    "gemma-4-31b": TransformerConfig(
        vocab_size=262144,
        num_layers=60,
        hidden_size=5376,
        layers=tuple(
            Layer(mixer=mixer, mlp=geglu(dim=21504), norms="both", output_scale=True)
            for mixer in (*[_sliding] * 5, _full)
        ),
        norm=NormConfig(eps=1e-6),
        tie_embeddings=True,
        scale_embeddings=True,
        logit_softcap=30.0,
    )
}
"""The text part of google/gemma-4-31B."""
