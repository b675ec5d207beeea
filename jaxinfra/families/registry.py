"""Finds a family of published models by its `model_type`: those of this package, and those that others add."""

import importlib
from collections.abc import Iterator
from types import ModuleType

from jaxinfra.config.text import nearest
from jaxinfra.errors import ConfigError, quoted
from jaxinfra.families.common import Family
from jaxinfra.plugins import load_plugin, plugins

MODULES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3_moe",
    "qwen3_next": "qwen3_next",
    "qwen3_5_text": "qwen3_5",
    "qwen3_5_moe_text": "qwen3_5_moe",
    "mistral": "mistral",
    "mixtral": "mixtral",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gemma4_text": "gemma4",
    "gpt2": "gpt2",
    "olmo2": "olmo2",
    "olmo3": "olmo3",
    "phi3": "phi3",
    "smollm3": "smollm3",
    "granite": "granite",
    "deepseek_v3": "deepseek",
    "kimi_k2": "deepseek",
    "gpt_oss": "gpt_oss",
    "glm4_moe": "glm4_moe",
    "llama4_text": "llama4",
    "llama4": "llama4",
    "gemma3": "gemma3",
    "gemma4": "gemma4",
    "mistral3": "mistral",
    "qwen3_5": "qwen3_5",
    "qwen3_5_moe": "qwen3_5_moe",
}
"""Module of each `model_type`. A model is written as the first one that can say what it has."""


def family(model_type: str, where: str) -> Family:
    """Returns the family of a `model_type`; ConfigError names the nearest one if it is unknown."""
    known = _model_types()
    if model_type not in known:
        near = nearest(model_type, known, cutoff=0.4)
        hint = f"did you mean {near}?" if near else f"known are {', '.join(known)}"
        raise ConfigError(f"{where}: model_type {quoted(model_type)} is not supported; {hint}")
    return _load(model_type)


def all_families() -> Iterator[Family]:
    """Yields all families, those of other packages last."""
    return map(_load, _model_types())


def family_modules() -> list[ModuleType]:
    """Returns the modules of the families of this package; each has the shapes of its models, `SHAPES`."""
    return [importlib.import_module(f"jaxinfra.families.{name}") for name in dict.fromkeys(MODULES.values())]


def _model_types() -> list[str]:
    return [*dict.fromkeys([*MODULES, *plugins("families")])]


def _load(model_type: str) -> Family:
    if model_type not in MODULES:
        return load_plugin("families", model_type, Family)
    module = importlib.import_module(f"jaxinfra.families.{MODULES[model_type]}")
    return next(each for each in vars(module).values() if isinstance(each, Family) and each.model_type == model_type)
