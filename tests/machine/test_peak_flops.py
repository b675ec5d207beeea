from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas.tpu import ChipVersion, get_tpu_info_for_chip

from jaxinfra.machine.peak_flops import PEAK_FLOPS, measure_flops, peak_flops

BFLOAT16 = jnp.dtype("bfloat16")


@pytest.mark.parametrize(
    ("kind", "version", "cores"),
    [
        ("TPU v4", ChipVersion.TPU_V4, 2),
        ("TPU v4 lite", ChipVersion.TPU_V4I, 1),
        ("TPU v5 lite", ChipVersion.TPU_V5E, 1),
        ("TPU v5", ChipVersion.TPU_V5P, 2),
        ("TPU v6 lite", ChipVersion.TPU_V6E, 1),
        ("TPU7x", ChipVersion.TPU_7X, 1),
    ],
)
def test_tpus_are_as_fast_as_pallas_says(kind: str, version: ChipVersion, cores: int) -> None:
    """Its table, for its own cost estimates, is of a core; v4 and v5p have two in a device."""
    found, source = peak_flops(SimpleNamespace(platform="tpu", device_kind=kind), BFLOAT16, 8)
    assert found == pytest.approx(cores * get_tpu_info_for_chip(version, 1).bf16_ops_per_second, rel=0.01)
    assert source == f"data sheet, bfloat16, {kind}"


@pytest.mark.parametrize("kind", PEAK_FLOPS)
def test_the_longest_start_counts(kind: str) -> None:
    """An "NVIDIA H100 PCIe" is not an "NVIDIA H100", whatever else stands behind its name."""
    chip = SimpleNamespace(platform="accelerator", device_kind=f"{kind} 80GB")
    assert peak_flops(chip, BFLOAT16, 8)[1] == f"data sheet, bfloat16, {kind}"


def test_cpu_devices_share_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxinfra.machine.peak_flops.measure_flops", lambda device, dtype: 80.0)
    assert peak_flops(jax.devices()[0], jnp.dtype("float32"), 8) == (10.0, "estimated from a float32 matmul")


def test_unknown_chips_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxinfra.machine.peak_flops.measure_flops", lambda device, dtype: 80.0)
    chip = SimpleNamespace(platform="gpu", device_kind="Another Chip")
    assert peak_flops(chip, jnp.dtype("bfloat16"), 8) == (80.0, "estimated from a bfloat16 matmul on Another Chip")


def test_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the fastest of five matmuls, 2 size^3 FLOPs each, on a clock that the test sets."""
    times_s = iter([0.0, 4.0, 10.0, 12.0, 20.0, 23.0, 30.0, 34.0, 40.0, 44.0])
    monkeypatch.setattr("jaxinfra.machine.peak_flops.time", SimpleNamespace(perf_counter=lambda: next(times_s)))
    assert measure_flops(jax.devices()[0], jnp.dtype("float32"), size=64) == pytest.approx(2 * 64**3 / 2.0)
