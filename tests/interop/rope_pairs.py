"""Every type of rotary positions with every family, against transformers; run by hand, for some ten minutes.

    python -m pytest tests/interop/rope_pairs.py -q -rs

A pair that is refused is skipped with the reason. CI runs one case of each type, in `test_families`.
"""

from typing import Any

import pytest

from jaxinfra.errors import ConfigError
from jaxinfra.families.registry import MODULES, family
from jaxinfra.interop.config_json import ModelJson
from tests.interop.conftest import References, make_references
from tests.interop.references import LLAMA3, TINY, YARN
from tests.interop.test_families import logits_of
from tests.interop.torch_python import needs_torch
from tests.models.harness import relative_error

TYPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn with both mscales": YARN | {"mscale": 0.7, "mscale_all_dim": 1.4},
    "yarn with mscale": YARN | {"mscale": 0.7},
    "yarn with mscale_all_dim": YARN | {"mscale_all_dim": 1.4},
    "yarn with a factor": YARN | {"mscale": 0.7, "mscale_all_dim": 1.4, "attention_factor": 1.2},
    "yarn without rounding": YARN | {"truncate": False},
    "longrope up to the original length": {"rope_type": "longrope", "original_max_position_embeddings": 24},
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 16},
}
WITHOUT = ("gpt2", "kimi_k2", "llama4", "gemma3", "gemma4", "mistral3", "qwen3_5", "qwen3_5_moe")
FAMILIES = [name for name in MODULES if name not in WITHOUT]
"""All but one without rotary positions, one that transformers does not have, and those with images."""


def keys_of(model_type: str, rope: dict[str, Any]) -> dict[str, Any]:
    """Returns the keys of the family's first tiny model, with other rotary positions."""
    first = next(keys for keys in TINY.values() if keys["model_type"] == model_type)
    keys = {name: value for name, value in first.items() if name not in ("gradients", "rope_parameters")}
    keys |= {"rope_scaling": None, "rope_theta": 500.0}
    if model_type == "mixtral":
        keys |= {"head_dim": 8}  # without it YaRN and LongRoPE fail in transformers
    if rope["rope_type"] == "longrope":
        layers = family(model_type, "").read(ModelJson(keys)).all_layers
        (rotary, head_dim), *_ = filter(None, (layer.mixer.rotary(keys["hidden_size"]) for layer in layers))
        pairs = range(int(head_dim * rotary.fraction) // 2)
        factors = {"short_factor": [1 + 0.1 * n for n in pairs], "long_factor": [1 + 0.7 * n for n in pairs]}
        keys, rope = keys | {"max_position_embeddings": 64}, rope | factors
        if model_type == "phi3":
            keys["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    return keys | {"rope_scaling": rope}


PAIRS = {f"{name}, {kind}": keys_of(name, rope) for name in FAMILIES for kind, rope in TYPES.items()}


def refusal(keys: dict[str, Any]) -> str | None:
    """Returns why a config is refused, None if it is not."""
    try:
        read = ModelJson(keys)
        family(keys["model_type"], "").read(read)
        read.close()
    except ConfigError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def pairs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> References:
    """Makes the models of the selected tests."""
    folder, selected = tmp_path_factory.mktemp("pairs"), " ".join(item.name for item in request.session.items)
    wanted = {name: keys for name, keys in PAIRS.items() if f"[{name}]" in selected and refusal(keys) is None}
    make_references(folder, wanted, {})
    return References(folder)


@needs_torch
@pytest.mark.parametrize("pair", PAIRS)
def test_logits_are_those_of_transformers(pairs: References, pair: str) -> None:
    if (reason := refusal(PAIRS[pair])) is not None:
        pytest.skip(reason)
    expected = pairs.arrays(pair)
    logits, _, _ = logits_of(pairs.folder / pair, inputs=expected["tokens"])
    assert relative_error(logits, expected["logits"]) < 1e-5
    assert relative_error(expected["rewritten"], expected["logits"]) < 1e-6
