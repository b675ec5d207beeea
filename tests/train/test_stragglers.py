"""Processes whose devices are slow are found by the same matmuls on all."""

import jax
import pytest

from jaxinfra.processes.peers import Peers
from jaxinfra.train.phases import Phases
from jaxinfra.train.stragglers import DeviceProbe, Stragglers
from tests.refusals import names


def _three_processes() -> Stragglers:
    peers = Peers()
    peers.count, peers.hosts = 3, ("node1", "node2", "node3")
    return Stragglers(Phases(), peers)


def test_slow_devices_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    stragglers = _three_processes()
    stragglers.judge_devices(30, [0.002, 0.009, None])  # a process has ended, or not measured them
    assert not stragglers.metrics
    stragglers.judge_devices(60, [0.002, 0.009, 0.002])
    stragglers.judge_devices(90, [0.0022, 0.002, 0.002])
    stragglers.judge_devices(120, [0.002, 0.009, 0.002])
    assert not caplog.records  # one measurement may be noise
    for step in (150, 180, 210):
        stragglers.judge_devices(step, [0.002, 0.008, 0.002])
    (record,) = caplog.records
    names(record.getMessage(), "step 150 process 1 node2 compute slowly matmuls 4.0 times")
    assert stragglers.metrics == {"slowest_devices": 1.0, "slowest_devices_slowdown": 4.0}


def test_of_two_that_are_slow_both_are_named(caplog: pytest.LogCaptureFixture) -> None:
    stragglers = _three_processes()
    stragglers.judge_devices(30, [0.002, 0.0080, 0.0079])
    stragglers.judge_devices(60, [0.002, 0.0079, 0.0080])
    stragglers.judge(5, [[0.0, 0.1], [0.3, 0.3], [0.0, 0.3]])
    stragglers.judge(10, [[0.0, 0.3], [0.3, 0.3], [0.0, 0.3]])
    devices, others, host = (record.getMessage() for record in caplog.records)
    names(devices, "step 60 devices of process 1 node2")
    names(others, "step 60 devices of process 2 node3")
    names(host, "step 10 process 1 node2 holds up the others 300 ms")


def test_devices_are_measured_only_where_that_says_something(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not after steps so short that a late thread would count, not in a profile, and not in a run of one process."""
    stragglers, sent, steps_s = _three_processes(), list[object](), [0.01, 0.5, 0.5]
    monkeypatch.setattr(Phases, "median_step_s", lambda phases: steps_s.pop(0))
    monkeypatch.setattr(Peers, "collect", lambda peers, value, channel, use: sent.append(value))
    for skip in (False, False, True):
        stragglers.probe_devices(30, skip=skip)
    short, measured, skipped = sent
    assert short is None and isinstance(measured, float) and measured > 0 and skipped is None
    assert stragglers.probes_after(30) and not stragglers.probes_after(31)
    assert not Stragglers(Phases(), Peers()).probes_after(30)


def test_devices_are_measured_beside_the_mesh_of_a_run() -> None:
    devices = jax.devices()
    with jax.set_mesh(jax.make_mesh((len(devices),), ("data",), devices=devices)):
        assert (DeviceProbe().measure(0.01) or 0.0) > 0


def test_a_measurement_that_fails_is_a_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(probe: DeviceProbe, matmuls: int) -> float:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nallocations: many")

    monkeypatch.setattr(DeviceProbe, "_run", no_memory)
    assert DeviceProbe().measure(0.01) is None
    (record,) = caplog.records
    names(record.getMessage(), "speed of the devices not measured RESOURCE_EXHAUSTED training goes on")
