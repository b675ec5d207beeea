"""Every option of the decoder against the NumPy reference: logits to 2e-5 of the largest, in float32."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from jaxinfra.models.attention import AttentionTemperature
from jaxinfra.models.latent import LatentAttention
from jaxinfra.objectives.causal_lm import CausalLM
from jaxinfra.ops.rope import LinearScaling, Llama3Scaling, LongRopeScaling, Rope, YarnScaling
from jaxinfra.parallel.mesh_config import MeshConfig
from tests.models import numpy_reference
from tests.models.harness import MODELS, Applied, build, random_tokens, relative_error

TOLERANCE = 2e-5
# Wavelengths are 6 to 6,000 positions: some frequencies are kept, some divided, some between.
LLAMA3_SCALING = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=256)

LATENT = LatentAttention(
    num_heads=4, kv_lora_rank=8, q_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=10
)

YARN = YarnScaling(factor=4.0, original_length=64, beta_fast=4.0)

LONG = LongRopeScaling(divisors=(1.0, 1.5, 3.0, 9.0), original_length=6)
BY_LENGTH = replace(LONG, short_divisors=(1.0, 1.1, 1.3, 2.0))

FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "multi-head": {"num_kv_heads": None},
    "multi-query": {"num_kv_heads": 1},
    "default head_dim": {"head_dim": None},
    "rope theta": {"rope": Rope(theta=100.0)},
    "partial rotary": {"rope": Rope(fraction=0.5)},
    "linear scaling": {"rope": Rope(scaling=LinearScaling(factor=3.0))},
    "llama-3 scaling": {"rope": Rope(scaling=LLAMA3_SCALING)},
    "yarn": {"rope": Rope(scaling=YarnScaling(factor=8.0, original_length=256))},
    "yarn on whole scores": {"rope": Rope(scaling=YarnScaling(mscale_all_dim=1.0))},
    "latent": {"mixer": LATENT},
    "latent without a query latent": {"mixer": replace(LATENT, q_lora_rank=None)},
    "latent with its own eps": {"mixer": replace(LATENT, norm_eps=0.1)},
    "latent, sliding window": {
        "mixer": LATENT,
        "windows": (3, None),
        "window_rope": Rope(theta=50.0, fraction=0.5),
        "norm_offset": 1.0,
        "query_scale": 0.9,
        "softcap": 1.5,
    },
    "no positions": {"rope": None},
    "layernorm": {"norm_type": "layernorm"},
    "norm eps": {"norm_eps": 0.1},
    "norm offset": {"norm_offset": 1.0},
    "post norms": {"norms": "both"},
    "geglu": {"mlp_activation": "geglu"},
    "gelu": {"mlp_activation": "gelu"},
    "qkv bias": {"qkv_bias": True},
    "out bias": {"out_bias": True},
    "mlp bias": {"mlp_bias": True},
    "qk norm": {"qk_norm": "head", "norm_offset": 1.0},
    "softcap": {"softcap": 1.5},
    "query scale": {"query_scale": 0.9},
    "window": {"windows": (4,)},
    "window of one": {"windows": (1,)},
    "alternating windows": {"windows": (3, None), "num_layers": 4},
    "a last period that is cut short": {"windows": (3, 3, None), "num_layers": 5},
    "window rope": {
        "windows": (5, None),
        "rope": Rope(theta=1e6, scaling=LinearScaling(factor=8.0)),
        "window_rope": Rope(theta=50.0),
    },
    "sinks": {"sinks": True},
    "sinks, softcap and window": {"sinks": True, "softcap": 1.5, "windows": (3, None), "num_layers": 4},
    "chunks": {"chunk": 5},
    "temperature": {"rope": None, "temperature": AttentionTemperature(scale=0.5, floor=3)},
    "norm without weights": {"qk_norm": "l2", "norm_offset": 1.0},
    "norm over all heads": {"qk_norm": "all", "norm_offset": 1.0},
    "norms on the branch only": {"norms": "after"},
    "clamped swiglu": {"mlp_activation": "clamped_swiglu"},
    "multipliers": {"embedding_multiplier": 3.0, "residual_multiplier": 0.3, "logits_scaling": 4.0},
    "yarn without rounding": {"rope": Rope(theta=100.0, scaling=replace(YARN, truncate=False))},
    "longrope": {"rope": Rope(scaling=LONG)},
    "longrope up to the original length": {"rope": Rope(scaling=replace(BY_LENGTH, original_length=12))},
    "tied": {"tie_embeddings": True},
    "scaled embeddings": {"scale_embeddings": True},
    "learned positions": {"rope": None, "learned_positions": 16},
    **MODELS,
}


@pytest.mark.parametrize("feature", FEATURES)
def test_logits_agree_with_the_definition(feature: str) -> None:
    built = build(**FEATURES[feature])
    values, tokens = built.values(), random_tokens()
    expected = numpy_reference.logits(values, built.config, tokens)
    assert relative_error(built.logits(values, tokens), expected) < TOLERANCE


def test_every_feature_changes_the_logits() -> None:
    plain = build()
    for feature, changes in FEATURES.items():
        changed = build(**changes)
        if changed.config == plain.config or changed.specs != plain.specs:
            continue
        values = changed.values()
        expected, without = (numpy_reference.logits(values, b.config, random_tokens()) for b in (changed, plain))
        assert relative_error(without, expected) > 100 * TOLERANCE, feature


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_logits_do_not_depend_on_the_mesh(changes: dict[str, Any]) -> None:
    built = build(MeshConfig(replica=2, fsdp=2, tensor=2), **changes)
    values, tokens = built.values(), random_tokens(rows=4)
    expected = numpy_reference.logits(values, built.config, tokens)
    assert relative_error(built.logits(values, tokens), expected) < TOLERANCE


DOCUMENTS = np.array([[0] * 5 + [1] * 7, [3] * 1 + [4] * 2 + [9] * 9], np.int32)
RESTARTED = np.array([[*range(5), *range(7)], [0, 0, 1, *range(9)]], np.int32)


PACKED = MODELS | {"longrope": {"rope": Rope(scaling=BY_LENGTH)}}
"""The last one has other frequencies for the documents of 7 and 9 tokens than for those of 1, 2 and 5."""


@pytest.mark.parametrize("changes", PACKED.values(), ids=PACKED)
def test_documents_of_a_row_do_not_attend_to_each_other(changes: dict[str, Any]) -> None:
    built = build(**changes)
    values, tokens = built.values(), random_tokens()
    actual = built.logits(values, tokens, RESTARTED, DOCUMENTS)
    expected = numpy_reference.logits(values, built.config, tokens, RESTARTED, DOCUMENTS)
    assert relative_error(actual, expected) < TOLERANCE

    other = tokens.copy()
    other[0, 2] = (other[0, 2] + 1) % built.config.vocab_size
    changed = built.logits(values, other, RESTARTED, DOCUMENTS)
    assert np.array_equal(changed[0, 5:], actual[0, 5:]) and np.array_equal(changed[1], actual[1])
    assert np.array_equal(changed[0, :2], actual[0, :2]) and not np.array_equal(changed[0, 2:5], actual[0, 2:5])


def test_loss_is_the_cross_entropy_of_the_capped_logits() -> None:
    built = build(**MODELS["gemma"])
    values, tokens, targets = built.values(), random_tokens(), random_tokens(seed=1)
    weights = np.random.default_rng(2).integers(0, 2, tokens.shape).astype(np.float32)
    logits = numpy_reference.logits(values, built.config, tokens, RESTARTED, DOCUMENTS)
    expected = (numpy_reference.entropies(logits, targets, 2.0) * weights).sum()
    batch = {"inputs": tokens, "targets": targets, "positions": RESTARTED, "segments": DOCUMENTS, "weights": weights}
    with jax.set_mesh(built.mesh):
        objective = CausalLM(loss_chunks=3)
        placed = jax.tree.map(built.put_rows, batch)
        total, sums = jax.jit(lambda p, b: objective.loss(Applied(built), p, b))(built.put(values), placed)
    assert relative_error(total, expected) < TOLERANCE and relative_error(sums["loss"], expected) < TOLERANCE
    assert sums["weight"] == weights.sum()
