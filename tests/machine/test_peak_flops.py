from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas.tpu import ChipVersion, get_tpu_info_for_chip

from jaxinfra.machine.measured import FILE, keep_measured, read_measured
from jaxinfra.machine.peak_flops import PEAK_FLOPS, measure_flops, peak_flops
from tests.refusals import names

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


def test_cpu_devices_share_a_peak_that_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine does not lower it: the MFU of the same work is the same in the next run."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    float32, measured = jnp.dtype("float32"), iter([80.0, 13.0, 82.0, 160.0, 24.0])
    monkeypatch.setattr("jaxinfra.machine.peak_flops.measure_flops", lambda device, dtype: next(measured))
    found = [peak_flops(jax.devices()[0], float32, 8) for _ in range(4)]
    assert [flops for flops, _ in found] == [10.0, 10.0, 10.0, 20.0]
    assert found[0][1].startswith("estimated from a float32 matmul")
    (tmp_path / "jaxinfra" / FILE).write_text("{")
    assert peak_flops(jax.devices()[0], float32, 8)[0] == 3.0, "a damaged file is measured anew"


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "jaxinfra").write_text("a file in place of the folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep_measured("a name", 1.0)
    names(caplog.messages[0], FILE, "not kept")
    assert read_measured("a name") is None


def test_unknown_chips_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxinfra.machine.peak_flops.measure_flops", lambda device, dtype: 80.0)
    chip = SimpleNamespace(platform="gpu", device_kind="Another Chip")
    assert peak_flops(chip, jnp.dtype("bfloat16"), 8) == (80.0, "estimated from a bfloat16 matmul on Another Chip")


def test_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the fastest of five matmuls, 2 size^3 FLOPs each, on a clock that the test sets."""
    times_s = iter([0.0, 4.0, 10.0, 12.0, 20.0, 23.0, 30.0, 34.0, 40.0, 44.0])
    monkeypatch.setattr("jaxinfra.machine.peak_flops.time", SimpleNamespace(perf_counter=lambda: next(times_s)))
    assert measure_flops(jax.devices()[0], jnp.dtype("float32"), size=64) == pytest.approx(2 * 64**3 / 2.0)
