"""The families of published models: each is a file with its shapes and its form at Hugging Face, in both directions."""

import difflib
import importlib
from types import ModuleType

from jaxinfra.errors import ConfigError, quoted
from jaxinfra.families.common import Family

__all__ = ["Family", "all_families", "family", "family_modules"]

MODULES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3_moe",
    "qwen3_next": "qwen3_next",
    "mistral": "mistral",
    "mixtral": "mixtral",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
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
    "mistral3": "mistral",
}
"""Module of each `model_type`. A model is written as the first one that can say what it has."""


def family(model_type: str, where: str) -> Family:
    """Returns the family of a `model_type`; ConfigError names the nearest one if it is unknown."""
    if model_type not in MODULES:
        near = difflib.get_close_matches(model_type, MODULES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(MODULES)}"
        raise ConfigError(f"{where}: model_type {quoted(model_type)} is not supported; {hint}")
    return _load(model_type)


def all_families() -> list[Family]:
    """Returns all families."""
    return [_load(model_type) for model_type in MODULES]


def family_modules() -> list[ModuleType]:
    """Returns the modules of all families; each has the shapes of its models, `SHAPES`."""
    return [importlib.import_module(f"{__name__}.{name}") for name in dict.fromkeys(MODULES.values())]


def _load(model_type: str) -> Family:
    module = importlib.import_module(f"{__name__}.{MODULES[model_type]}")
    return next(each for each in vars(module).values() if isinstance(each, Family) and each.model_type == model_type)
