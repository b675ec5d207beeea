"""Configs of published models are read and written, and what would change their numbers is refused."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jaxinfra.errors import ConfigError
from jaxinfra.families.canonical import stated
from jaxinfra.families.registry import family
from jaxinfra.families.rotary import read_rope
from jaxinfra.families.zoo import shape
from jaxinfra.hub.published_model import differences, open_published
from jaxinfra.interop.config_json import ModelJson
from jaxinfra.interop.quantized import read_quantization
from jaxinfra.models.transformer import TransformerConfig
from jaxinfra.ops.rope import Rope, YarnScaling
from tests.interop.config_keys import LLAMA3
from tests.interop.conftest import published
from tests.interop.published_configs import CONFIGS, OLMO3_YARN
from tests.interop.published_experts import EXPERT_CONFIGS
from tests.interop.references import YARN
from tests.interop.test_families import PUBLISHED, tensors
from tests.refusals import raises

LLAMA = CONFIGS["llama-3.1-8b"]


def read(keys: dict[str, Any]) -> TransformerConfig:
    json = ModelJson(keys)
    model = family(json.model_type, json.where).read(json)
    read_quantization(json)
    json.close(stated(model))
    return model


MODULES = ("deepseek-v3", "glm-4.5-air", "qwen3.5-27b")
"""Models whose keys name a module for multi-token prediction, which shapes of the zoo leave out."""


@pytest.mark.parametrize("name", CONFIGS)
def test_published_configs_are_the_shapes_of_the_zoo(name: str) -> None:
    model = read(CONFIGS[name])
    assert model.mtp_depths == (name in MODULES)
    assert differences(replace(model, mtp=None), shape(name)) == []


CODER = EXPERT_CONFIGS["qwen3-30b-a3b"] | {
    "max_position_embeddings": 262144,
    "qkv_bias": False,
    "rope_theta": 10000000,
    "shared_expert_intermediate_size": 0,
    "use_qk_norm": True,
}
"""Qwen/Qwen3-Coder-30B-A3B-Instruct."""

GEMMA_9B = CONFIGS["gemma-2-2b"] | {
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "num_attention_heads": 16,
    "num_hidden_layers": 42,
    "num_key_value_heads": 8,
    "sliding_window_size": 4096,
}
"""google/gemma-2-9b."""


def test_keys_that_say_what_the_model_does_anyway() -> None:
    model = shape("qwen3-30b-a3b")
    (layer,) = model.layers
    coder = replace(model, layers=(replace(layer, mixer=replace(layer.mixer, rope=Rope(theta=1e7))),))
    assert differences(read(CODER), coder) == []
    assert differences(read(GEMMA_9B), shape("gemma-2-9b")) == []
    read(LLAMA | {"use_sliding_window": False, "qkv_bias": False, "use_qk_norm": False, "use_mrope": False})
    for keys, words in (
        (CODER | {"qkv_bias": True}, "qkv_bias=True False"),
        (CODER | {"use_qk_norm": False}, "use_qk_norm=False True"),
        (CODER | {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size=64 0"),
        (GEMMA_9B | {"sliding_window_size": 2048}, "sliding_window_size=2048 4096"),
        (LLAMA | {"sliding_window_size": 4096}, "sliding_window_size=4096"),
    ):
        with raises(ConfigError, words):
            read(keys)


def test_written_configs_are_read_as_the_same_model() -> None:
    for name, of, model in published():
        assert differences(read({"model_type": of.model_type} | of.write(model)), model) == [], name


def test_what_a_family_cannot_say_is_named() -> None:
    of, model = PUBLISHED["llama-3.2-1b"]
    (layer,) = model.layers
    alien = replace(model, layers=(layer, replace(layer, mixer=replace(layer.mixer, qk_norm="head"))))
    found = differences(alien, read({"model_type": "llama"} | of.write(alien)))
    assert [each.path for each in found] == [f"layers.{index}.mixer.qk_norm" for index in range(1, 16, 2)]
    for option in ({"dropout": 0.1}, {"remat": "full"}, {"layers": (layer, layer)}):  # inference is the same
        assert differences(replace(model, **option), model) == []
    # Of the families with such attention none multiplies scores.
    rope = Rope(scaling=YarnScaling(mscale_all_dim=1.0))
    scores = replace(model, layers=(replace(layer, mixer=replace(layer.mixer, rope=rope)),))
    assert "mscale" in differences(scores, read({"model_type": "llama"} | of.write(scores)))[0].path
    with raises(ConfigError, "layer 0 LatentAttention Attention"):
        of.write(shape("deepseek-v3"))


LONG = {"long_factor": [2.0], "short_factor": [1.0], "original_max_position_embeddings": 16}
ROPE_TYPES = {
    "default": {},
    "linear": {"factor": 2.0},
    "llama3": LLAMA3,
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 16},
    "longrope": LONG,
    "proportional": {},
    "su": LONG,
}


def test_the_page_lists_the_rope_types_that_are_read() -> None:
    page = (Path(__file__).parents[2] / "docs/huggingface.md").read_text()
    table = page.partition("| `rope_type` |")[2].partition("\n\n")[0]
    listed = {name for line in table.splitlines() for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    for name, keys in ROPE_TYPES.items():
        read_rope(ModelJson({"max_position_embeddings": 32, "rope_scaling": keys | {"rope_type": name}}))
    with raises(ConfigError, "dynamic") as caught:
        read_rope(ModelJson({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}))
    named = {*re.split(", | or ", str(caught.value).rpartition("; use ")[2])}
    assert listed == named == {*ROPE_TYPES}


def test_other_forms_of_names_are_read() -> None:
    of, model = PUBLISHED["gpt2"]
    assert "transformer.h.11.attn.c_attn.weight" in tensors(of, model)
    assert "h.11.attn.c_attn.weight" in tensors(of, model, {"wte.weight"})
    images, text = family("gemma3", ""), PUBLISHED["gemma-3-4b"][1]
    names = tensors(images, text, {"language_model.model.embed_tokens.weight"})
    assert "language_model.model.layers.33.self_attn.q_norm.weight" in names


WRONG = {
    "an unknown key": (LLAMA | {"logit_scale": 0.5}, "logit_scale=0.5"),
    "an unknown key of a part": (LLAMA | {"rope_scaling": {"type": "default", "turns": 3}}, "rope_scaling: turns=3"),
    "an unknown family": (LLAMA | {"model_type": "lama"}, "lama llama"),
    "another type": (LLAMA | {"hidden_size": "4096"}, "hidden_size '4096' int"),
    "a missing key": ({name: LLAMA[name] for name in LLAMA if name != "vocab_size"}, "vocab_size"),
    "no layers": (LLAMA | {"num_hidden_layers": 0}, "num_hidden_layers 0 1"),
    "another activation": (LLAMA | {"hidden_act": "relu2"}, "hidden_act='relu2' 'silu'"),
    "another scaling": (LLAMA | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' yarn"),
    "layers of another number": (CONFIGS["olmo-3-7b"] | {"layer_types": ["full_attention"]}, "layer_types 32"),
    "other kinds of layers": (CONFIGS["olmo-3-7b"] | {"layer_types": ["linear_attention"] * 32}, "layer_types"),
    "positions of too few layers": (CONFIGS["smollm3-3b"] | {"no_rope_layers": [1, 0]}, "no_rope_layers 36"),
    "other scores of experts": (CONFIGS["kimi-k2"] | {"scoring_func": "softmax"}, "scoring_func='softmax' 'sigmoid'"),
    "other halves of heads": (CONFIGS["deepseek-v3"] | {"rope_interleave": False}, "rope_interleave=False True"),
    "another limit": (CONFIGS["gpt-oss-120b"] | {"swiglu_limit": 8.0}, "swiglu_limit=8.0 7.0"),
    "other chunks": (CONFIGS["llama-4-maverick"] | {"layer_types": ["full_attention"] * 48}, "layer_types"),
    "no number of experts": ({**CONFIGS["kimi-k2"], "n_routed_experts": None}, "n_routed_experts"),
    "another quantization": (CONFIGS["kimi-k2"] | {"quantization_config": {"quant_method": "awq"}}, "'awq' 'fp8'"),
    "YaRN in a Phi": (CONFIGS["phi-4"] | {"rope_scaling": OLMO3_YARN}, "YarnScaling LongRoPE"),
    "a factor that YaRN cannot have": (
        LLAMA | {"rope_scaling": YARN | {"factor": 1.0, "attention_factor": 1.2}},
        "1.2",
    ),
    "LongRoPE for long documents alone": (
        CONFIGS["phi-4"] | {"rope_scaling": {"type": "longrope", "long_factor": [1.0] * 64}},
        "rope_scaling short_factor",
    ),
    "YaRN without rounding beside another": (
        CONFIGS["olmo-3-7b"] | {"rope_scaling": OLMO3_YARN | {"truncate": False}},
        "truncate=False",
    ),
    "embeddings for each layer": (
        {
            "model_type": "gemma4",
            "text_config": CONFIGS["gemma-4-31b"]["text_config"] | {"hidden_size_per_layer_input": 256},
        },
        "hidden_size_per_layer_input=256",
    ),
    "another activation of convolutions": (
        EXPERT_CONFIGS["qwen3-next-80b-a3b"] | {"hidden_act": "gelu_pytorch_tanh"},
        "hidden_act='gelu_pytorch_tanh' 'silu'",
    ),
    "attention both ways": (CONFIGS["gemma-2-2b"] | {"use_bidirectional_attention": True}, "bidirectional"),
    "scores by layer": (CONFIGS["gpt2"] | {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx"),
}


def test_sizes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    for name, value, words in (("num_key_value_heads", 5, "num_kv_heads"), ("hidden_size", -8, "hidden_size -8")):
        (tmp_path / "config.json").write_text(json.dumps(LLAMA | {name: value}))
        with raises(ConfigError, "config.json", words):
            open_published(f"hf:{tmp_path}")


@pytest.mark.parametrize("case", WRONG)
def test_what_would_change_the_numbers_is_refused(case: str) -> None:
    keys, words = WRONG[case]
    with raises(ConfigError, words):
        read(keys)
