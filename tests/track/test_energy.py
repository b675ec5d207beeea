"""The energy of GPUs that are not there (`fake_nvml`): what is counted, sampled, missing, and shown beside the plan."""

import json
import re
import sys
from pathlib import Path

import pynvml
import pytest

from jaxinfra.errors import ConfigError
from jaxinfra.processes.peers import Peers
from jaxinfra.track.config import TrackConfig
from jaxinfra.track.energy import GpuMeter
from jaxinfra.track.formatting import format_energy
from jaxinfra.track.goodput import account, read_ledger, total
from jaxinfra.train import energy
from tests.refusals import names, raises
from tests.tiny_run import Tiny
from tests.tiny_run import tiny as tiny
from tests.tiny_run import tiny_data as tiny_data
from tests.track.fake_nvml import FakeNvml


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml([100.0, 300.0])
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


@pytest.mark.parametrize(
    ("visible", "watts"), [("", 100.0), ("1", 300.0), ("GPU-1, GPU-0", 300.0)], ids=["all", "by number", "by name"]
)
def test_of_the_gpus_of_a_process_the_counter_is_read(nvml: FakeNvml, visible: str, watts: float) -> None:
    nvml.watts = [0.0 if each != watts else each for each in nvml.watts]
    meter = GpuMeter([0], {"CUDA_VISIBLE_DEVICES": visible})
    meter.start()
    nvml.added_joules += 50.0
    meter.close()
    assert (meter.joules or 0.0) > 50.0 and not nvml.is_open


def test_a_driver_that_was_loaded_again_counts_from_zero(nvml: FakeNvml) -> None:
    nvml.watts = [0.0, 0.0]
    meter = GpuMeter([0, 1], {})
    meter.start()
    for joules in (1e6 + 10.0, 0.0, 5.0):
        nvml.added_joules = joules
        meter.sample()
    meter.close()
    assert meter.joules == pytest.approx(2 * (10.0 + 5.0))


def test_without_a_counter_the_power_is_sampled(nvml: FakeNvml) -> None:
    nvml.counts = False
    meter = GpuMeter([0, 1], {})
    meter.start()
    began_s = meter._sampled_s
    meter.sample()
    assert meter.joules == pytest.approx(400.0 * (meter._sampled_s - began_s))
    meter.close()


def test_what_nvml_refuses_is_a_warning(nvml: FakeNvml, caplog: pytest.LogCaptureFixture) -> None:
    meter = GpuMeter([7], {})
    meter.start()
    meter.close()
    assert meter.joules is None
    names(caplog.records[-1].getMessage(), "track.energy Invalid Argument training goes on")
    meter = GpuMeter([0], {})
    meter.start()
    nvml.error = pynvml.NVML_ERROR_GPU_IS_LOST
    for _ in range(2):
        meter.sample()
    meter.close()
    assert len(caplog.records) == 2 and meter.joules is not None
    names(caplog.records[-1].getMessage(), "track.energy GPU is lost")


def test_without_a_gpu_or_a_driver_or_the_package(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real module, which finds no library of NVIDIA on a machine of tests."""
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: (_ for _ in ()).throw(pynvml.NVMLError(12)))
    for devices, why in (([], "uses no NVIDIA GPU"), ([0], "NVML Shared Library Not Found")):
        meter = GpuMeter(devices, {})
        meter.start()
        meter.close()
        assert meter.joules is None
        names(caplog.records[-1].getMessage(), f"track.energy {why}")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with raises(ConfigError, "track.energy pynvml pip install jaxinfra[energy]"):
        GpuMeter([0])


def test_the_energy_of_a_run_stands_beside_that_of_its_plan(
    nvml: FakeNvml, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy, "_local_gpus", lambda: [0, 1])
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps([{"estimate_s": 0.1, "joules": 60_000.0, "devices": 8, "device_kind": "cpu"}]))
    assert tiny.launch("track.energy=nvml", f"track.plan={plan}").code == 0
    run = account(read_ledger(tiny.directory() / "goodput.jsonl"))
    assert run.joules is not None and run.joules > 0 and run.planned_joules == 12 * 60_000.0
    assert total([run, run]).planned_joules == 24 * 60_000.0
    line = format_energy(run.joules, run.planned_joules)
    assert "planned 0.2 kWh" in line
    printed = tiny.launch("--json", f"{tmp_path}/goodput.json", command="goodput", config=tiny.directory()).out
    (values,) = json.loads((tmp_path / "goodput.json").read_text()).values()
    assert line in printed and values["joules"] == run.joules and values["planned_joules"] == run.planned_joules
    # The page is made before the last row of the ledger.
    text = (tiny.directory() / "report.html").read_text()
    page = re.search(r"energy of the devices (\S+) kWh, planned 0.2 kWh", text)
    assert page and 0 < float(page[1]) <= 1.01 * run.joules / 3.6e6
    checked = tiny.launch("--plan", str(plan), command="plan --check", config=tiny.directory()).out
    assert "planned 60,000 J" in checked


def test_process_0_adds_up_what_all_processes_have_told(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "_local_gpus", lambda: [0])
    peers, values = (
        Peers(),
        list[list]([[1.0, 5.0, None], [2.0, None, 7.0]]),
    )  # a process has no GPU, then one has ended
    peers.count = 3
    monkeypatch.setattr(Peers, "collect", lambda peers, value, channel, use: use(values.pop(0)))
    nvml.watts = [0.0, 0.0]
    with energy.Energy(TrackConfig(energy="nvml"), peers) as measured:
        for joules in (5.0, 12.0):
            measured.tell()
            assert measured.joules == joules
    with energy.Energy(TrackConfig(), peers) as nothing:
        nothing.tell()
        assert nothing.joules is None
