"""Tells whether two models compute the same in inference."""

from collections.abc import Iterable
from dataclasses import fields, is_dataclass, replace
from typing import Any

from jaxinfra.models.attention import Attention
from jaxinfra.models.families.common import shortest_period
from jaxinfra.models.moe import MixtureOfExperts
from jaxinfra.models.transformer import Layer, TransformerConfig


def canonical(model: TransformerConfig) -> TransformerConfig:
    """Returns the config that all models have that compute the same in inference.

    Defaults that depend on other fields are None, the period is the shortest one, and what is for training only has its
    default.
    """
    plain = TransformerConfig(vocab_size=1, hidden_size=1, num_layers=1, layers=())
    options = ("attention_kernel", "context_attention", "dropout", "remat")
    first = tuple(_canonical_layer(layer, model) for layer in model.first_layers)
    layers = [_canonical_layer(layer, model) for layer in model.all_layers[len(first) :]]
    period = shortest_period(layers)
    return replace(model, first_layers=first, layers=period, **{name: getattr(plain, name) for name in options})


def _canonical_layer(layer: Layer, model: TransformerConfig) -> Layer:
    mixer, mlp = layer.mixer, layer.mlp
    if isinstance(mixer, Attention):
        width = mixer.head_width(model.hidden_size)
        mixer = replace(
            mixer,
            num_kv_heads=None if mixer.kv_head_count == mixer.num_heads else mixer.num_kv_heads,
            head_dim=None if width * mixer.num_heads == model.hidden_size else width,
            query_scale=None if mixer.query_scale == width**-0.5 else mixer.query_scale,
        )
    if isinstance(mlp, MixtureOfExperts):
        mlp = replace(mlp, capacity_factor=None, balance_loss=0.0, z_loss=0.0)
    return replace(layer, mixer=mixer, mlp=mlp)


def differences(one: TransformerConfig, other: TransformerConfig) -> list[str]:
    """Returns the fields in which two models differ in inference, such as `layers.0.mixer.qkv_bias=True`.

    The values are those of the first model.
    """
    models = (replace(each, layers=each.all_layers, first_layers=()) for each in (canonical(one), canonical(other)))
    return [*_differences("", *models)]


def _differences(path: str, one: Any, other: Any) -> Iterable[str]:
    if is_dataclass(one) and type(one) is type(other):
        for field in fields(one):
            yield from _differences(f"{path}.{field.name}", getattr(one, field.name), getattr(other, field.name))
    elif isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
        for index, pair in enumerate(zip(one, other, strict=True)):
            yield from _differences(f"{path}.{index}", *pair)
    elif one != other:
        yield f"{path.removeprefix('.')}={one!r}"
