"""Facts about the models of `zoo`, for `jaxinfra models` and its page: sizes, memory and context. Imports no JAX.

They are read from catalog.json, which is generated: to build all models takes seconds, to read the file does not.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_FILE = Path(__file__).with_name("catalog.json")

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
