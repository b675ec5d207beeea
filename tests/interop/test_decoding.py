"""Decoding with a cache gives the logits of a whole forward pass, for the oddest tiny model of each family."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra.families.registry import all_families, family
from jaxinfra.interop.config_json import ModelJson
from jaxinfra.parallel.rules import ShardingRules
from tests.interop.references import TINY
from tests.models.harness import build, relative_error

LENGTH, SLOTS, PROMPTS = 24, 32, (9, 1, 4)
STEPS = LENGTH - max(PROMPTS)
TEST_KEYS = ("gradients", "documents", "prompts")  # that say what else is compared
PAST_SHORT = ("phi3-long",)  # longer than the short factors of LongRoPE: test_rope.py
CASES = {}
for name, each in TINY.items():
    if "vision_config" not in each and name not in PAST_SHORT:
        CASES.setdefault(each["model_type"], []).append(name)
ODDEST = {model_type: max(names, key=lambda name: len(TINY[name])) for model_type, names in CASES.items()}


def test_every_family_is_tried() -> None:
    others = {
        "gemma3",
        "gemma4",
        "llama4",
        "mistral3",
        "kimi_k2",
        "qwen3_5",
        "qwen3_5_moe",
    }  # have the decoder of another one
    assert {*ODDEST} == {each.model_type for each in all_families()} - others


@pytest.mark.parametrize("name", ODDEST.values())
def test_decoding_agrees_with_the_forward_pass(name: str) -> None:
    """Prompts of unlike lengths at once, then token by token; all of it is one compiled program."""
    keys = {key: value for key, value in TINY[name].items() if key not in TEST_KEYS}
    config = family(keys["model_type"], "").read(ModelJson(keys))
    built = build(config=replace(config, attention_kernel="reference"), rules=ShardingRules(block_sequence=()))
    counts, rows = np.array(PROMPTS), np.arange(len(PROMPTS))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (len(PROMPTS), LENGTH), dtype=np.int32)
    prompts = np.where(np.arange(max(PROMPTS)) < counts[:, None], tokens[:, : max(PROMPTS)], 7)
    following = tokens[rows, counts + np.arange(STEPS)[:, None]][..., None]  # [STEPS, B, 1]

    def run(params, tokens, prompts, following):
        model = built.model(params)
        whole = model({"inputs": tokens}).materialize()
        first, cache = model.decode(prompts, model.empty_cache(len(PROMPTS), SLOTS), jnp.asarray(counts))

        def step(cache, tokens):
            logits, cache = model.decode(tokens, cache)
            return cache, logits.materialize()[:, 0]

        _, rest = jax.lax.scan(step, cache, following)
        return whole, first.materialize(), rest

    with jax.set_mesh(built.mesh), jax.default_matmul_precision("highest"):
        placed = (built.put_rows(tokens), built.put_rows(prompts), following)
        whole, first, rest = map(np.asarray, jax.jit(run)(built.put(built.values()), *placed))
    for row, count in enumerate(PROMPTS):
        found = np.concatenate([first[row, :count], rest[:, row]])
        assert relative_error(found, whole[row, : count + STEPS]) < 2e-5, row
