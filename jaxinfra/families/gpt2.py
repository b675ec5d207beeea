"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm and biases.

Matrices are stored `[in, out]`, and those of queries, keys and values in one tensor.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from jaxinfra.families.common import ACTIVATION_NAMES, Family, decoder, dense_layers
from jaxinfra.interop.config_json import MAX_LAYERS, ModelJson
from jaxinfra.interop.rules import Rule, fused, rule
from jaxinfra.models.attention import Attention
from jaxinfra.models.layers import MLP, NormConfig
from jaxinfra.models.transformer import TransformerConfig

_decoder = partial(decoder, rope=None, qkv_bias=True, out_bias=True)


def _gpt2(num_layers: int, hidden_size: int, num_heads: int, length: int = 1024) -> TransformerConfig:
    """openai-community/gpt2 and gpt2-{medium,large,xl}; GPT-3's largest (Brown et al. 2020) with dense attention."""
    return _decoder(
        vocab_size=50257,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        mlp=MLP(dim=4 * hidden_size, activation="gelu", bias=True),
        norm=NormConfig(type="layernorm"),
        learned_positions=length,
        tie_embeddings=True,
    )


SHAPES: dict[str, TransformerConfig] = {
    "gpt2": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl": _gpt2(48, 1600, 25),
    "gpt3-175b": _gpt2(96, 12288, 96, length=2048),
}


def read(keys: ModelJson) -> TransformerConfig:
    """Reads the keys of a GPT-2."""
    keys.require("activation_function", "gelu_new", "gelu_pytorch_tanh", default="gelu_new")
    keys.require("scale_attn_weights", True, default=True)
    keys.require("scale_attn_by_inverse_layer_idx", False, default=False)
    keys.ignore("n_ctx", "reorder_and_upcast_attn", "dtype", "torch_dtype")
    # Of a head that sums up a text in one vector.
    keys.ignore(*(f"summary_{name}" for name in ("activation", "first_dropout", "proj_to_labels", "type", "use_proj")))
    width = keys.take("n_embd", int, 768)
    return _decoder(
        vocab_size=keys.take("vocab_size", int, 50257),
        num_layers=keys.take_between("n_layer", 1, MAX_LAYERS, default=12),
        hidden_size=width,
        num_heads=keys.take("n_head", int, 12),
        mlp=MLP(dim=keys.take("n_inner", int, 4 * width), activation="gelu", bias=True),
        norm=NormConfig(type="layernorm", eps=keys.take("layer_norm_epsilon", float, 1e-5)),
        learned_positions=keys.take("n_positions", int, 1024),
        tie_embeddings=keys.take("tie_word_embeddings", bool, True),
    )


def write(model: TransformerConfig) -> dict[str, Any]:
    """Returns the keys of a GPT-2."""
    mixer, mlp = dense_layers(model)[0]
    return {
        "vocab_size": model.vocab_size,
        "n_layer": model.num_layers,
        "n_embd": model.hidden_size,
        "n_head": mixer.num_heads,
        "n_inner": None if mlp.dim == 4 * model.hidden_size else mlp.dim,
        "n_positions": model.learned_positions,
        "activation_function": ACTIVATION_NAMES.get(mlp.activation),
        "layer_norm_epsilon": model.norm.eps,
        "tie_word_embeddings": model.tie_embeddings,
    }


def model_rules(model: TransformerConfig) -> Iterator[Rule]:
    """Yields the rules of embeddings, the last norm and the LM head."""
    yield rule("transformer.wte.weight", "embedding", "v d -> v d")
    yield rule("transformer.wpe.weight", "positions", "t d -> t d")
    yield from _norm_rules("transformer.ln_f", "norm")
    if not model.tie_embeddings:
        yield rule("lm_head.weight", "unembedding", "v d -> d v")


def attention_rules(mixer: Attention) -> Iterator[Rule]:
    """Yields the rules of attention and of the norm before it."""
    parts = [f"attention.{name}" for name in ("query", "key", "value")]
    yield from _norm_rules("ln_1", "attention_norm")
    # The braces are around what the fused tensor has three times, one after another.
    yield fused("attn.c_attn.weight", *((f"{part}.weight", "d ({h k}) -> d h k") for part in parts))
    yield fused("attn.c_attn.bias", *((f"{part}.bias", "({h k}) -> h k") for part in parts))
    yield rule("attn.c_proj.weight", "attention.out.weight", "(h k) d -> h k d")
    yield rule("attn.c_proj.bias", "attention.out.bias", "d -> d")


def mlp_rules(mlp: MLP) -> Iterator[Rule]:
    """Yields the rules of an MLP and of the norm before it."""
    yield from _norm_rules("ln_2", "mlp_norm")
    for theirs, ours in (("c_fc", "up"), ("c_proj", "down")):
        yield rule(f"mlp.{theirs}.weight", f"mlp.{ours}.weight", "i o -> i o")
        yield rule(f"mlp.{theirs}.bias", f"mlp.{ours}.bias", "o -> o")


def _norm_rules(theirs: str, ours: str) -> tuple[Rule, Rule]:
    return rule(f"{theirs}.weight", f"{ours}.scale", "d -> d"), rule(f"{theirs}.bias", f"{ours}.bias", "d -> d")


FAMILY = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    read=read,
    write=write,
    model_rules=model_rules,
    norm_rules=lambda layer: (),  # `mixer_rules` and `mlp_rules` yield each norm before what it is for
    mixer_rules=attention_rules,
    mlp_rules=mlp_rules,
    layer_prefix="transformer.h.{layer}.",
    unused=("*lm_head.weight", "*.attn.bias", "*.attn.masked_bias"),  # a copy of tied embeddings, and masks
    other_prefix=("transformer.", ""),  # published files leave it out
)
