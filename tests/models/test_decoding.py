"""Decoding with a cache gives the logits of a forward pass over the whole sequence, to 2e-5 of the largest."""

from typing import Any

import jax
import numpy as np
import pytest

from jaxinfra.ops.rope import LinearScaling, Rope
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.parallel.rules import ShardingRules
from tests.models.harness import MODELS, ONE, BuiltDecoder, build, random_tokens, relative_error, slow_but

PROMPT, PADDING, LENGTH, SLOTS = 5, 3, 12, 16
# A single token has no positions to shard between blocks.
DECODING = ShardingRules(block_sequence=())
MESHES = {
    "llama": MeshConfig(fsdp=4),
    "gemma": MeshConfig(fsdp=2, tensor=2),
    "gpt-2": MeshConfig(replica=2, fsdp=2, tensor=2),
    "deepseek": MeshConfig(fsdp=2, tensor=2),
    "qwen3-next": MeshConfig(fsdp=2, tensor=2),
    "unlike": MeshConfig(fsdp=2, tensor=2),
}
SLIDING = {
    "windows": (3,),
    "num_kv_heads": 1,
    "rope": Rope(fraction=0.5, scaling=LinearScaling(factor=2.0)),
}


def decode(built: BuiltDecoder, values: dict[str, Any], tokens: np.ndarray, prompt: int) -> np.ndarray:
    """Returns logits `[B, T, V]`: for the padded prompt at once, then token by token."""
    with jax.set_mesh(built.mesh):
        forward, params = built.forward, built.put(values)
        cache = jax.jit(lambda p: built.model(p).empty_cache(len(tokens), SLOTS))(params)
        pieces = []
        for start, end in [(0, prompt), *((i, i + 1) for i in range(prompt, tokens.shape[1]))]:
            padded = np.pad(tokens[:, start:end], [(0, 0), (0, 0 if start else PADDING)], constant_values=7)
            logits, cache = forward(params, built.put_rows(padded), cache=cache, count=end - start)
            pieces.append(np.asarray(logits)[:, : end - start])
        assert cache is not None and int(cache.length) == tokens.shape[1]
    return np.concatenate(pieces, axis=1)


def check(changes: dict[str, Any], mesh: MeshConfig) -> None:
    built = build(mesh, rules=DECODING, **changes)
    values, tokens = built.values(), random_tokens(4, LENGTH)
    assert relative_error(decode(built, values, tokens, PROMPT), built.logits(values, tokens)) < 2e-5


@pytest.mark.parametrize("changes", [*MODELS.values(), SLIDING], ids=[*MODELS, "sliding"])
def test_decoding_agrees_with_the_forward_pass(changes: dict[str, Any]) -> None:
    check(changes, ONE)


@pytest.mark.parametrize("model", slow_but("llama", "gpt-2"))
def test_decoding_on_a_mesh_agrees_with_the_forward_pass(model: str) -> None:
    check(MODELS[model], MESHES[model])
