from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from jaxinfra.runtime.peak_flops import measure_flops, peak_flops

KINDS = {
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM3": 989e12,
}


@pytest.mark.parametrize(("kind", "flops"), KINDS.items())
def test_known_chips(kind: str, flops: float) -> None:
    """The longest matching prefix counts: "TPU v5 lite" is not "TPU v5"."""
    chip = SimpleNamespace(platform="accelerator", device_kind=kind)
    found, source = peak_flops(chip, jnp.dtype("bfloat16"), 8)
    assert found == flops and "bfloat16" in source


def test_cpu_devices_share_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxinfra.runtime.peak_flops.measure_flops", lambda device, dtype: 80.0)
    assert peak_flops(jax.devices()[0], jnp.dtype("float32"), 8) == (10.0, "estimated from a float32 matmul")


def test_unknown_chips_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxinfra.runtime.peak_flops.measure_flops", lambda device, dtype: 80.0)
    chip = SimpleNamespace(platform="gpu", device_kind="Another Chip")
    assert peak_flops(chip, jnp.dtype("bfloat16"), 8) == (80.0, "estimated from a bfloat16 matmul on Another Chip")


def test_measured() -> None:
    """No CPU core is outside this range, from a tenth of a GFLOP/s to 10 TFLOP/s."""
    assert 1e8 < measure_flops(jax.devices()[0], jnp.dtype("float32"), size=256) < 1e13
