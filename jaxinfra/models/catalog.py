"""Facts about the models of `zoo`, for `jaxinfra models` and its page: sizes, memory and context. Imports no JAX.

They are read from catalog.json, which is generated: to build all models takes seconds, to read the file does not.
"""

import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

_FILE = Path(__file__).with_name("catalog.json")

# Longest sequence of the published weights, in tokens, by prefix of the name: `max_position_embeddings` of their
# configs, and of Qwen3 and Gemma 3 what their model cards say. The longest prefix counts.
CONTEXT = {
    "llama-2": 4096,
    "llama-3-": 8192,
    "llama-3.": 131072,
    "smollm2": 8192,
    "smollm3": 65536,
    "qwen2-": 131072,
    "qwen2.5": 131072,
    "qwen2.5-0.5b": 32768,
    "qwen2.5-1.5b": 32768,
    "qwen2.5-3b": 32768,
    "qwen3": 32768,
    "mistral": 32768,
    "mistral-nemo": 131072,
    "mixtral": 32768,
    "gemma-2": 8192,
    "gemma-3": 131072,
    "gemma-3-1b": 32768,
    "qwen3-next": 262144,
    "deepseek-v3": 163840,
    "kimi-k2": 131072,
    "glm-4.5": 131072,
    "gpt-oss": 131072,
    "llama-4-scout": 10485760,
    "llama-4-maverick": 1048576,
    "gpt2": 1024,
    "olmo-2": 4096,
    "olmo-3": 65536,
    "phi-3": 4096,
    "phi-4": 16384,
    "phi-4-mini": 131072,
    "granite-3.1": 131072,
}

BYTES_PER_PARAM = {"weights": 2, "training": 16}
"""Bytes of a parameter: bfloat16 weights; in training float32 parameters, gradients and both moments of AdamW."""


@dataclass(frozen=True, kw_only=True)
class CatalogEntry:
    """A model of the zoo.

    Attributes:
        name: as in `zoo.shape` or `zoo.vision_shape`.
        function: "shape" or "vision_shape".
        num_layers, hidden_size, num_heads, num_kv_heads, vocab_size: as in its config; None if it has no such field.
        parameters: number of parameters.
        active_parameters: parameters that a token passes through; fewer than all in a mixture of experts.
        context: longest sequence of the published weights in tokens, or None.
    """

    name: str
    function: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int | None
    vocab_size: int | None
    parameters: int
    active_parameters: int
    context: int | None


@cache
def catalog() -> tuple[CatalogEntry, ...]:
    """Returns all models, in the order of the zoo."""
    return tuple(CatalogEntry(**entry) for entry in json.loads(_FILE.read_text(encoding="utf-8")))


def published_context(name: str) -> int | None:
    """Returns the longest sequence of the published weights, in tokens."""
    prefixes = [prefix for prefix in CONTEXT if name.startswith(prefix)]
    return CONTEXT[max(prefixes, key=len)] if prefixes else None


def catalog_text(entries: tuple[CatalogEntry, ...]) -> str:
    """Returns the contents of catalog.json: a line for each model."""
    return "[\n" + ",\n".join(json.dumps(asdict(entry)) for entry in entries) + "\n]\n"
