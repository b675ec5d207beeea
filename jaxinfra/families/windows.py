"""Layers with and without a sliding window in `config.json`."""

from collections.abc import Callable, Iterable
from typing import Any

from jaxinfra.errors import ConfigError
from jaxinfra.families.common import read_rope
from jaxinfra.interop.config_json import ModelJson
from jaxinfra.models.attention import Attention
from jaxinfra.ops.rope import Rope, YarnScaling

FULL, SLIDING = "full_attention", "sliding_attention"
"""Kinds of layers: without a window, and with one."""


def read_windows(keys: ModelJson, has_window: Callable[[int], object]) -> list[int | None]:
    """Reads the window of each layer; without `layer_types`, `has_window` tells it from the index of the layer."""
    count, window = keys.num_layers, keys.optional("sliding_window", int)
    default = [SLIDING if window is not None and has_window(index) else FULL for index in range(count)]
    kinds = keys.take_kinds("layer_types", (FULL, SLIDING), count, default)
    if SLIDING in kinds and window is None:
        raise ConfigError(f"{keys.where}: layer_types has {SLIDING}, but there is no sliding_window")
    return [window if kind == SLIDING else None for kind in kinds]


def read_optional_windows(keys: ModelJson, has_window: Callable[[int], object]) -> list[int | None]:
    """Reads the window of each layer, where `use_sliding_window` says whether any has one."""
    if keys.take("use_sliding_window", bool, False):
        return read_windows(keys, has_window)
    keys.ignore("sliding_window", "layer_types", "max_window_layers")
    return [None] * keys.num_layers


def write_windows(mixers: Iterable[Attention]) -> dict[str, Any]:
    """Returns the keys of the windows of all layers."""
    windows = [mixer.window for mixer in mixers]
    return {
        "sliding_window": next((window for window in windows if window is not None), None),
        "layer_types": [FULL if window is None else SLIDING for window in windows],
    }


def read_two_ropes(keys: ModelJson, theta: float, sliding: Callable[[Rope], Rope]) -> dict[str, Rope]:
    """Reads rotary positions of layers without and with a window.

    Published files scale only the former; `sliding` returns the latter. `rope_parameters` have both. What transformers
    does not see where there are two is refused.
    """
    keys.require("original_max_position_embeddings", None)
    full = read_rope(keys, FULL, theta)
    unscaled = sliding(full)
    ropes = {FULL: full, SLIDING: read_rope(keys, SLIDING, unscaled.theta) if "rope_parameters" in keys else unscaled}
    if any(isinstance(rope.scaling, YarnScaling) and not rope.scaling.truncate for rope in ropes.values()):
        raise ConfigError(f"{keys.where}: truncate=False is not supported for two kinds of layers, only True")
    return ropes
