"""Compares models by what they compute in inference, and tells which keys of files state it."""

from dataclasses import replace

from jaxinfra.models.attention import Attention
from jaxinfra.models.layers import MLP
from jaxinfra.models.moe import MixtureOfExperts
from jaxinfra.models.transformer import Layer, TransformerConfig


def canonical(model: TransformerConfig) -> TransformerConfig:
    """Returns the config that all models have that compute the same in inference.

    It lists all layers, and says what else follows from other fields. What is for training only is off.
    """
    layers = tuple(_canonical_layer(layer, model.hidden_size) for layer in model.all_layers)
    mtp = model.mtp and replace(model.mtp, layer=_canonical_layer(model.mtp.layer, model.hidden_size))
    return replace(model, first_layers=(), layers=layers, dropout=0.0, mtp=mtp)


def _canonical_layer(layer: Layer, hidden_size: int) -> Layer:
    mixer, mlp = layer.mixer, layer.mlp
    if isinstance(mixer, Attention):
        width = mixer.head_width(hidden_size)
        scale = width**-0.5 if mixer.query_scale is None else mixer.query_scale
        mixer = replace(mixer, num_kv_heads=mixer.kv_head_count, head_dim=width, query_scale=scale)
    if isinstance(mlp, MixtureOfExperts):
        rate = float(mlp.bias_update_rate > 0)  # above 0 there are biases
        mlp = replace(mlp, capacity_factor=None, balance_loss=0.0, z_loss=0.0, bias_update_rate=rate)
    return replace(layer, mixer=mixer, mlp=mlp)


def stated(model: TransformerConfig) -> dict[str, object]:
    """Returns what keys of `config.json` say of a model whose family does not read them, as transformers does not."""
    mixers = [layer.mixer for layer in model.all_layers if isinstance(layer.mixer, Attention)]
    experts = [layer.mlp for layer in model.all_layers if isinstance(layer.mlp, MixtureOfExperts)]
    windows = {mixer.window for mixer in mixers} - {None}
    found = {
        "attention_bias": (bias for mixer in mixers for bias in (mixer.qkv_bias, mixer.out_bias)),
        "lm_head_bias": [False],
        "mlp_bias": (layer.mlp.bias for layer in model.all_layers if isinstance(layer.mlp, MLP | MixtureOfExperts)),
        "qkv_bias": (mixer.qkv_bias for mixer in mixers),
        "shared_expert_intermediate_size": [mlp.num_shared_experts * mlp.dim for mlp in experts] or [0],
        "sliding_window_size": windows,
        "use_bidirectional_attention": [False],
        "use_mrope": [False],
        "use_qk_norm": (mixer.qk_norm is not None for mixer in mixers),
        "use_sliding_window": [bool(windows)],
    }
    values = {name: [*set(each)] for name, each in found.items()}
    return {name: each[0] for name, each in values.items() if len(each) == 1}  # of layers that are alike in it
