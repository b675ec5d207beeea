"""Phi-3 (Abdin et al. 2024) and Phi-4: queries, keys and values in one tensor, and gate and up in another."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from jaxinfra.errors import ConfigError
from jaxinfra.families.common import Family, decoder, dense_layers, read_attention, read_model, write_model
from jaxinfra.families.rotary import read_rope
from jaxinfra.interop.config_json import ModelJson
from jaxinfra.interop.rules import Rule, fused, rule
from jaxinfra.models.attention import Attention
from jaxinfra.models.layers import MLP
from jaxinfra.models.transformer import TransformerConfig
from jaxinfra.ops.rope import LongRopeScaling, Rope

# microsoft/Phi-3-{mini,medium}-4k-instruct, phi-4 and, below, Phi-4-mini-instruct
_phi3 = partial(decoder, vocab_size=32064, window=2047)
_phi4 = partial(decoder, vocab_size=100352, rope=Rope(theta=250000.0))
PHI4_MINI_DIVISORS = (
    1.0, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649, 2.446418898,
    2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533, 5.984965424,
    6.693110555, 7.485043894, 8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651, 14.64173252, 16.37415215,
    18.31155283, 20.47818807, 22.90118105, 25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64,
    32.66, 32.7, 32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
)  # fmt: skip
_MINI_SCALING = LongRopeScaling(divisors=PHI4_MINI_DIVISORS, short_divisors=(1.0,) * 48, factor=32.0)

SHAPES: dict[str, TransformerConfig] = {
    "phi-3-mini-4k": _phi3(num_layers=32, hidden_size=3072, num_heads=32, num_kv_heads=32, mlp=8192),
    "phi-3-medium-4k": _phi3(num_layers=40, hidden_size=5120, num_heads=40, num_kv_heads=10, mlp=17920),
    "phi-4": _phi4(num_layers=40, hidden_size=5120, num_heads=40, num_kv_heads=10, mlp=17920),
    "phi-4-mini": decoder(
        num_layers=32,
        hidden_size=3072,
        num_heads=24,
        num_kv_heads=8,
        mlp=8192,
        rope=Rope(theta=10000.0, fraction=0.75, scaling=_MINI_SCALING),
        window=262144,
        vocab_size=200064,
        tie_embeddings=True,
    ),
}


def read(keys: ModelJson) -> TransformerConfig:
    """Reads the keys of a Phi-3."""
    keys.default(rms_norm_eps=1e-5, original_max_position_embeddings=4096)
    for name in ("full_attn_mod", "interpolate_factor"):  # of the code published with Phi-4-mini
        keys.require(name, 1, default=1)
    keys.ignore("original_max_position_embeddings")
    rope = read_rope(keys, partial=True)
    if not isinstance(rope.scaling, LongRopeScaling | None):
        raise ConfigError(f"{keys.where}: {type(rope.scaling).__name__} is not supported for a phi3, only LongRoPE")
    mixer = read_attention(keys, rope=rope, window=keys.optional("sliding_window", int))
    return read_model(keys, mixer)


def write(model: TransformerConfig) -> dict[str, Any]:
    """Returns the keys of a Phi-3."""
    mixer, _ = dense_layers(model)[0]
    keys = write_model(model) | {"sliding_window": mixer.window}
    if mixer.rope is not None and isinstance(mixer.rope.scaling, LongRopeScaling):
        keys["original_max_position_embeddings"] = mixer.rope.scaling.original_length  # where Phi-3 has it
    return keys


def attention_rules(mixer: Attention) -> Iterator[Rule]:
    """Yields the rules of attention, which has no biases."""
    parts = [f"attention.{name}.weight" for name in ("query", "key", "value")]
    yield fused("self_attn.qkv_proj.weight", *((part, "({h k}) d -> d h k") for part in parts))
    yield rule("self_attn.o_proj.weight", "attention.out.weight", "d (h k) -> h k d")


def mlp_rules(mlp: MLP) -> Iterator[Rule]:
    """Yields the rules of an MLP."""
    parts = [f"mlp.{name}.weight" for name in ("gate", "up")]
    yield fused("mlp.gate_up_proj.weight", *((part, "({o}) i -> i o") for part in parts))
    yield rule("mlp.down_proj.weight", "mlp.down.weight", "o i -> i o")


FAMILY = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    read=read,
    write=write,
    mixer_rules=attention_rules,
    mlp_rules=mlp_rules,
)
