"""Decoders from flat options, for tests that change one option at a time."""

from dataclasses import replace
from typing import Any

from jaxinfra.models.attention import Attention
from jaxinfra.models.layers import MLP
from jaxinfra.models.mixer import Mixer
from jaxinfra.models.moe import MixtureOfExperts
from jaxinfra.models.transformer import Layer, TransformerConfig
from jaxinfra.ops.rope import Rope


def decoder(
    *,
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    mixer: Mixer | None = None,
    mlp: MLP | MixtureOfExperts | None = None,
    **options: Any,
) -> TransformerConfig:
    """Returns a decoder of alike layers; other options are those of `changed`."""
    layer = Layer(mixer=mixer or Attention(num_heads=4), mlp=mlp or MLP(dim=64))
    plain = TransformerConfig(vocab_size=vocab_size, hidden_size=hidden_size, num_layers=num_layers, layers=(layer,))
    return changed(plain, **options)


def changed(
    config: TransformerConfig,
    windows: tuple[int | None, ...] = (None,),
    window_rope: Rope | None = None,
    **options: Any,
) -> TransformerConfig:
    """Changes options of the model, of its norms (`norm_eps`), and of all layers; those of a layer's parts by name.

    Args:
        config: the decoder.
        windows: makes a period of layers with these windows.
        window_rope: other rotary positions for the layers with a window.
        options: fields of `TransformerConfig` or `Layer`; those of an MLP begin with `mlp_`; any other of a mixer.
    """
    model, layer, mixer, mlp, norm = {}, {}, {}, {}, {}
    for name, value in options.items():
        if name in TransformerConfig.__dataclass_fields__:
            model[name] = value
        elif name in Layer.__dataclass_fields__:
            layer[name] = value
        elif name.startswith("norm_"):
            norm[name.removeprefix("norm_")] = value
        elif name.startswith("mlp_"):
            mlp[name.removeprefix("mlp_")] = value
        else:
            mixer[name] = value

    def change(old: Layer) -> Layer:
        new = replace(old, **layer)
        return replace(new, mixer=replace(new.mixer, **mixer), mlp=replace(new.mlp, **mlp))

    layers, local = tuple(map(change, config.layers)), {"rope": window_rope} if window_rope else {}
    if windows != (None,):
        layers = tuple(
            replace(each, mixer=replace(each.mixer, window=window, **local if window else {}))
            for each in layers
            for window in windows
        )
    first = tuple(map(change, config.first_layers))
    return replace(config, **({"layers": layers, "first_layers": first, "norm": replace(config.norm, **norm)} | model))
