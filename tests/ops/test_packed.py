"""Weights in int8 and NF4: the same codes, scales and numbers as bitsandbytes."""

import subprocess
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra.ops.packed import block_size, pack, unpack
from jaxinfra.parallel.rules import Packed
from tests.interop.torch_python import TORCH_PYTHON, needs_torch


@needs_torch
@pytest.mark.slow(12)
def test_codes_and_scales_are_those_of_bitsandbytes(tmp_path: Path) -> None:
    out = tmp_path / "packed.npz"
    subprocess.run([TORCH_PYTHON, Path(__file__).with_name("packed_torch.py"), out], check=True, capture_output=True)
    theirs = np.load(out)
    formats: tuple[Packed, ...] = ("nf4", "int8")
    for packed in formats:
        codes, scales = pack(jnp.asarray(theirs["weight"].T), (0,), packed)  # here inputs come first
        np.testing.assert_array_equal(np.asarray(codes).T, theirs[packed])
        np.testing.assert_array_equal(np.asarray(scales).T, theirs[f"{packed}_scales"])
        whole = np.asarray(unpack(codes, scales, 0, jnp.dtype("float32"))).T
        if packed == "nf4":
            np.testing.assert_array_equal(whole, theirs["nf4_whole"])


@pytest.mark.parametrize(("packed", "error"), [("int8", 1 / 254), ("nf4", 0.153)])
def test_numbers_are_near(packed: Packed, error: float) -> None:
    """Within half a step of int8, and half of the widest gap of NF4, of the largest magnitude beside them."""
    weight = np.random.default_rng(0).normal(size=(3, 24, 5, 8)).astype(np.float32)
    codes, scales = pack(jnp.asarray(weight), (1, 2), packed) if packed == "int8" else pack(weight, (1,), packed)
    found = unpack(codes, scales, 1, jnp.dtype("float32"))
    assert found.shape == weight.shape
    largest = np.asarray(scales) if packed == "int8" else np.repeat(np.asarray(scales), block_size(24), axis=1)
    assert (np.abs(found - weight) <= error * largest * 1.0001).all() and np.abs(found - weight).max() > 0
