"""The form of a config in which models are compared that compute the same in inference."""

from dataclasses import replace

from jaxinfra.models.attention import Attention
from jaxinfra.models.moe import MixtureOfExperts
from jaxinfra.models.transformer import Layer, TransformerConfig


def canonical(model: TransformerConfig) -> TransformerConfig:
    """Returns the config that all models have that compute the same in inference.

    It lists all layers, and says what else follows from other fields. What is for training only is off.
    """
    layers = tuple(_canonical_layer(layer, model.hidden_size) for layer in model.all_layers)
    return replace(model, first_layers=(), layers=layers, dropout=0.0)


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
