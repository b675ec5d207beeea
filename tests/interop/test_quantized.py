"""Weights of 8 and 4 bits are those of torch and transformers, bit for bit, and only the rows asked for are read."""

import subprocess
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jaxinfra.errors import ConfigError, DataError
from jaxinfra.interop.config_json import ModelJson
from jaxinfra.interop.folder import open_folder
from jaxinfra.interop.quantized import open_weights, read_quantization
from jaxinfra.interop.safetensors import Weights
from tests.interop.conftest import read_tensor, write_tensors
from tests.interop.test_families import logits_of
from tests.interop.torch_python import TORCH_PYTHON, needs_torch
from tests.models.harness import relative_error
from tests.refusals import raises

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


def opened(folder: Path, config: dict[str, Any]) -> Weights:
    quantization = read_quantization(ModelJson({"quantization_config": config}))
    return open_weights(open_folder(str(folder)), quantization)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed")
    subprocess.run([TORCH_PYTHON, Path(__file__).with_name("torch_quantized.py"), out], check=True, capture_output=True)
    return out


def rows(weights: Weights, name: str, start: int, stop: int) -> np.ndarray:
    out = np.empty((stop - start, *weights.tensors[name].shape[1:]), weights.tensors[name].dtype)
    weights.read_into(name, start, out)
    return out


def assert_same(actual: np.ndarray, expected: np.ndarray) -> None:
    """Equal bits, but those of NaN."""
    is_nan = [np.isnan(bits.view(ml_dtypes.bfloat16).astype(np.float32)) for bits in (actual, expected)]
    assert np.array_equal(*is_nan)
    assert np.array_equal(actual.view(np.int16)[~is_nan[0]], expected[~is_nan[1]])


@needs_torch
@pytest.mark.slow(15)
def test_fp8_blocks_are_those_of_torch_in_any_rows(packed: Path) -> None:
    weights, expected = opened(packed / "fp8", FP8), np.load(packed / "fp8.npz")
    assert sorted(weights.tensors) == ["edges.weight", "plain.weight", "small.weight", "whole.weight"]
    assert read_tensor(weights, "plain.weight").dtype == np.float32
    for name in expected:
        tensor = weights.tensors[f"{name}.weight"]
        assert tensor.dtype == ml_dtypes.bfloat16 and tensor.shape == expected[name].shape
        assert_same(read_tensor(weights, f"{name}.weight"), expected[name])
    before = weights.bytes_read
    assert_same(rows(weights, "edges.weight", 100, 300), expected["edges"][100:300])
    assert weights.bytes_read - before == 200 * 200 + 3 * 2 * 4  # rows of values, and of factors


@needs_torch
@pytest.mark.slow(1)
def test_mxfp4_is_that_of_transformers_for_every_scale(packed: Path) -> None:
    weights, expected = opened(packed / "mxfp4", MXFP4), np.load(packed / "mxfp4.npz")["experts.down_proj"]
    assert [*weights.tensors] == ["experts.down_proj"] and weights.tensors["experts.down_proj"].shape == expected.shape
    assert_same(rows(weights, "experts.down_proj", 1, 3), expected[1:3])
    assert weights.bytes_read == 2 * 64 * 4 * 17


@needs_torch
@pytest.mark.slow(5)
def test_a_model_with_mxfp4_has_the_logits_of_transformers(packed: Path) -> None:
    expected = np.load(packed / "model.npz")
    logits, _, _ = logits_of(packed / "model", inputs=expected["tokens"])
    assert relative_error(logits, expected["logits"]) < 1e-5
    assert (logits.argmax(-1) == expected["logits"].argmax(-1)).all()


def write(folder: Path, **tensors: np.ndarray) -> Path:
    """Writes a checkpoint; `__` in names stands for a dot."""
    write_tensors(folder, {name.replace("__", "."): array for name, array in tensors.items()})
    return folder


def test_what_is_not_understood_is_refused(tmp_path: Path) -> None:
    values = np.zeros((200, 130), ml_dtypes.float8_e4m3fn)
    for config, words in (
        ({"quant_method": "gptq"}, "quantization_config quant_method='gptq' fp8 mxfp4"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt='e5m2' e4m3"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size [128]"),
        ({"quant_method": "fp8"}, "weight_block_size"),
    ):
        with raises(ConfigError, words):
            opened(write(tmp_path, a__weight=values), config)
    with raises(DataError, "a.weight_scale_inv 2x1xfloat32 200x130xfloat8_e4m3fn 128x128"):
        opened(write(tmp_path, a__weight=values, a__weight_scale_inv=np.ones((2, 1), np.float32)), FP8)
    with raises(DataError, "a.weight_scale_inv a.weight"):
        opened(write(tmp_path, a__weight_scale_inv=np.ones((2, 1), np.float32)), FP8)
    blocks, scales = np.zeros((2, 3, 4, 16), np.uint8), np.zeros((2, 3, 5), np.uint8)
    with raises(DataError, "a_scales 2x3x5xuint8 2x3x4x16xuint8"):
        opened(write(tmp_path, a_blocks=blocks, a_scales=scales), MXFP4)
    with raises(DataError, "a_blocks a_scales"):
        opened(write(tmp_path, a_blocks=blocks), MXFP4)
