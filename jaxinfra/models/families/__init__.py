"""The families of published models: each is a file with its shapes and its form at Hugging Face, in both directions."""

import difflib
import importlib

from jaxinfra.errors import ConfigError
from jaxinfra.models.families.common import Family

__all__ = ["Family", "all_families", "family"]

MODULES = {
    "deepseek_v3": "deepseek",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "glm4_moe": "glm4_moe",
    "gpt2": "gpt2",
    "gpt_oss": "gpt_oss",
    "granite": "granite",
    "kimi_k2": "deepseek",
    "llama": "llama",
    "llama4": "llama4",
    "llama4_text": "llama4",
    "mistral": "mistral",
    "mistral3": "mistral",
    "mixtral": "mixtral",
    "olmo2": "olmo2",
    "olmo3": "olmo3",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3_moe",
    "smollm3": "smollm3",
}
"""Module of each `model_type`."""


def family(model_type: str, where: str) -> Family:
    """Returns the family of a `model_type`; ConfigError names the nearest one if it is unknown."""
    if model_type not in MODULES:
        near = difflib.get_close_matches(model_type, MODULES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(MODULES)}"
        raise ConfigError(f"{where}: model_type {model_type} is not supported; {hint}")
    return _load(model_type)


def all_families() -> list[Family]:
    """Returns all families."""
    return [_load(model_type) for model_type in MODULES]


def _load(model_type: str) -> Family:
    module = importlib.import_module(f"jaxinfra.models.families.{MODULES[model_type]}")
    return next(each for each in vars(module).values() if isinstance(each, Family) and each.model_type == model_type)
