"""OLMo 3 (OLMo Team 2025): OLMo 2 with a window in three of four layers; the fourth has scaled rotary positions."""

from functools import partial
from typing import Any

from jaxinfra.families import olmo2
from jaxinfra.families.common import Family, dense_layers, read_attention, read_model
from jaxinfra.families.windows import read_two_ropes, read_windows, write_windows
from jaxinfra.interop.config_json import ModelJson
from jaxinfra.models.transformer import TransformerConfig
from jaxinfra.ops.rope import Rope, YarnScaling

_FULL = {"rope": Rope(theta=500000.0, scaling=YarnScaling(factor=8.0, original_length=8192))}
_LOCAL = {"rope": Rope(theta=500000.0), "window": 4096}
# allenai/Olmo-3-{1025-7B,1125-32B}
_olmo3 = partial(olmo2.olmo_shape, vocab_size=100278, kinds=(_LOCAL, _LOCAL, _LOCAL, _FULL))

SHAPES: dict[str, TransformerConfig] = {
    "olmo-3-7b": _olmo3(num_layers=32, hidden_size=4096, num_heads=32, num_kv_heads=32, mlp=11008),
    "olmo-3-32b": _olmo3(num_layers=64, hidden_size=5120, num_heads=40, num_kv_heads=8, mlp=27648),
}


def read(keys: ModelJson) -> TransformerConfig:
    """Reads the keys of an OLMo 3."""
    keys.default(sliding_window=4096, rms_norm_eps=1e-5)
    rope, sliding_rope = read_two_ropes(keys, 500000.0, lambda full: Rope(theta=full.theta))
    mixer = read_attention(keys, rope=rope, bias=False, qk_norm="all")
    mixers = read_windows(keys, mixer, lambda index: (index + 1) % 4 > 0, sliding_rope)
    return read_model(keys, mixers, norms="after")


def write(model: TransformerConfig) -> dict[str, Any]:
    """Returns the keys of an OLMo 3."""
    return olmo2.write(model) | write_windows(mixer for mixer, _ in dense_layers(model))


FAMILY = Family(model_type="olmo3", architecture="Olmo3ForCausalLM", read=read, write=write)
