"""Decoding with a cache gives the logits of a forward pass over the whole sequence, to 2e-5 of the largest.

The prompts of a batch have unlike lengths.
"""

from typing import Any

import jax
import numpy as np
import pytest

from jaxinfra.ops.rope import LinearScaling, Rope
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.parallel.rules import ShardingRules
from tests.models.harness import MODELS, ONE, BuiltDecoder, build, random_tokens, relative_error, slow_but

LENGTH, SLOTS, PROMPTS = 12, 16, (5, 2, 1, 4)
STEPS = LENGTH - max(PROMPTS) + 1
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


def decode(built: BuiltDecoder, values: dict[str, Any], tokens: np.ndarray) -> np.ndarray:
    """Returns logits `[B, STEPS, V]` from the end of each prompt on: all prompts at once, then token by token."""
    rows, counts = np.arange(len(tokens)), np.array(PROMPTS)
    prompts = np.where(np.arange(max(PROMPTS)) < counts[:, None], tokens[:, : max(PROMPTS)], 7)  # padded at the end
    with jax.set_mesh(built.mesh):
        forward, params = built.forward, built.put(values)
        cache = jax.jit(lambda p: built.model(p).empty_cache(len(tokens), SLOTS))(params)
        logits, cache = forward(params, built.put_rows(prompts), cache=cache, counts=counts)
        pieces = [np.asarray(logits)[rows, counts - 1]]
        for step in range(STEPS - 1):
            logits, cache = forward(params, built.put_rows(tokens[rows, counts + step][:, None]), cache=cache)
            pieces.append(np.asarray(logits)[:, 0])
        assert cache is not None and np.array_equal(cache.lengths, counts + STEPS - 1)
    return np.stack(pieces, axis=1)


def check(changes: dict[str, Any], mesh: MeshConfig) -> None:
    built = build(mesh, rules=DECODING, **changes)
    values, tokens = built.values(), random_tokens(len(PROMPTS), LENGTH)
    expected = built.logits(values, tokens)
    steps = np.array(PROMPTS)[:, None] - 1 + np.arange(STEPS)
    assert relative_error(decode(built, values, tokens), np.take_along_axis(expected, steps[..., None], 1)) < 2e-5


@pytest.mark.parametrize("changes", [MODELS["unlike"], SLIDING], ids=["unlike", "sliding"])
def test_decoding_agrees_with_the_forward_pass(changes: dict[str, Any]) -> None:
    """The models of all families are tried in tests/interop/test_decoding.py."""
    check(changes, ONE)


@pytest.mark.parametrize("model", slow_but("llama", "gpt-2"))
def test_decoding_on_a_mesh_agrees_with_the_forward_pass(model: str) -> None:
    check(MODELS[model], MESHES[model])
