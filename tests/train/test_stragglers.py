"""Processes whose devices are slow are found by the same matmuls on all."""

import jax
import pytest

from jaxinfra.processes.peers import Peers
from jaxinfra.train.phases import Phases
from jaxinfra.train.stragglers import DeviceProbe, Stragglers
from tests.refusals import names


def test_slow_devices_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    peers = Peers()
    peers.hosts = ("node1", "node2", "node3")
    stragglers = Stragglers(Phases(), peers)
    stragglers.judge_devices(50, [0.002, 0.002, None])  # a process has ended
    assert not stragglers.metrics
    stragglers.judge_devices(100, [0.002, 0.009, 0.002])
    stragglers.judge_devices(150, [0.0022, 0.002, 0.002])
    stragglers.judge_devices(200, [0.002, 0.009, 0.002])
    assert not caplog.records  # one measurement may be noise
    for step in (250, 300, 350):
        stragglers.judge_devices(step, [0.002, 0.008, 0.002])
    (record,) = caplog.records
    names(record.getMessage(), "step 250 process 1 node2 compute slowly 8.00 ms 2.00 ms")
    assert stragglers.metrics == {"slowest_devices": 1.0, "slowest_devices_slowdown": 4.0}


def test_devices_are_measured_beside_the_mesh_of_a_run() -> None:
    """On CPUs a measurement is as long as half a step."""
    probe, devices = DeviceProbe(), jax.devices()
    with jax.set_mesh(jax.make_mesh((len(devices),), ("data",), devices=devices)):
        assert probe.measure(0.0) > 0
        assert probe.runs == 1
        probe.measure(1.0)
        assert probe.runs > 1
