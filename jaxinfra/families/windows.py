"""Layers with and without a sliding window in `config.json`."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from jaxinfra.errors import ConfigError
from jaxinfra.families.rotary import read_rope
from jaxinfra.interop.config_json import ModelJson
from jaxinfra.models.attention import Attention
from jaxinfra.ops.rope import Rope, YarnScaling

FULL, SLIDING = "full_attention", "sliding_attention"
"""Kinds of layers: without a window, and with one."""


def read_windows(
    keys: ModelJson, full: Attention, has_window: Callable[[int], bool], sliding_rope: Rope | None = None
) -> list[Attention]:
    """Reads which layers have a window; returns the attention of each layer.

    Args:
        keys: the keys of the model.
        full: attention of layers without a window.
        has_window: tells from the index of a layer whether it has a window, if there is no `layer_types`.
        sliding_rope: rotary positions of layers with a window; None are those of `full`.
    """
    count, window = keys.num_layers, keys.optional("sliding_window", int)
    default = [SLIDING if window is not None and has_window(index) else FULL for index in range(count)]
    kinds = keys.take_kinds("layer_types", (FULL, SLIDING), count, default)
    if SLIDING in kinds and window is None:
        raise ConfigError(f"{keys.where}: layer_types has {SLIDING}, but there is no sliding_window")
    rope = full.rope if sliding_rope is None else sliding_rope
    return [replace(full, window=window, rope=rope) if kind == SLIDING else full for kind in kinds]


def read_optional_windows(keys: ModelJson, full: Attention, has_window: Callable[[int], bool]) -> list[Attention]:
    """Reads like `read_windows`, where `use_sliding_window` says whether any layer has a window."""
    if keys.take("use_sliding_window", bool, False):
        return read_windows(keys, full, has_window)
    keys.ignore("sliding_window", "layer_types", "max_window_layers")
    return [full] * keys.num_layers


def write_windows(mixers: Iterable[Attention]) -> dict[str, Any]:
    """Returns the keys of the windows of all layers."""
    windows = [mixer.window for mixer in mixers]
    return {
        "sliding_window": next((window for window in windows if window is not None), None),
        "layer_types": [FULL if window is None else SLIDING for window in windows],
    }


def read_two_ropes(keys: ModelJson, theta: float, sliding: Callable[[Rope], Rope]) -> tuple[Rope, Rope]:
    """Reads rotary positions: those of layers without a window, and those of layers with one.

    Published files have only the former, and `sliding` returns the latter from them; `rope_parameters` have both. Keys
    that transformers does not look at where there are two are refused.
    """
    keys.require("original_max_position_embeddings", None)
    full = read_rope(keys, FULL, theta)
    local = sliding(full)
    local = read_rope(keys, SLIDING, local.theta) if "rope_parameters" in keys else local
    if any(isinstance(rope.scaling, YarnScaling) and not rope.scaling.truncate for rope in (full, local)):
        raise ConfigError(f"{keys.where}: truncate=False is not supported for two kinds of layers, only True")
    return full, local
