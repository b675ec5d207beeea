import re
import socket
from pathlib import Path

import pytest

from jaxinfra.cli.main import choose_devices
from jaxinfra.errors import ConfigError
from jaxinfra.launchers import local_processes
from jaxinfra.launchers.local_processes import process_environments
from tests.refusals import raises


@pytest.fixture(autouse=True)
def no_devices_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES", "XLA_FLAGS", "NPROC", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)


def shares(processes: int, devices: str | None, variable: str) -> list[str]:
    choose_devices(devices)
    return [environment[variable] for environment in process_environments(processes, devices)]


def test_processes_know_each_other() -> None:
    choose_devices("cpu:6")
    environments = process_environments(3, "cpu:6")
    assert [each["JAX_PROCESS_ID"] for each in environments] == ["0", "1", "2"]
    assert {each["JAX_NUM_PROCESSES"] for each in environments} == {"3"}
    assert {each["JAX_CPU_COLLECTIVES_IMPLEMENTATION"] for each in environments} == {"gloo"}
    (address,) = {each["JAX_COORDINATOR_ADDRESS"] for each in environments}
    host, _, port = address.partition(":")
    with socket.socket() as coordinator:
        coordinator.bind((host, int(port)))


def test_emulated_devices_are_shared() -> None:
    assert shares(4, "cpu:8", "JAX_NUM_CPU_DEVICES") == ["2"] * 4


def test_one_device_each_without_a_number() -> None:
    assert shares(3, "cpu", "JAX_NUM_CPU_DEVICES") == ["1"] * 3


@pytest.mark.parametrize(("processes", "devices"), [(3, "cpu:8"), (4, "cpu:2"), (2, "cpu:1")])
def test_both_fixes_of_an_unequal_share_work(processes: int, devices: str) -> None:
    choose_devices(devices)
    with raises(ConfigError, f"--devices {devices} --processes {processes}") as caught:
        process_environments(processes, devices)
    fix = re.search(r"use --devices (\S+), or --processes (\d+)$", str(caught.value))
    assert fix
    assert len(set(shares(processes, fix[1], "JAX_NUM_CPU_DEVICES"))) == 1
    choose_devices(devices)
    assert len(process_environments(int(fix[2]), devices)) == int(fix[2]) < processes


@pytest.mark.parametrize(
    ("visible", "processes", "expected"),
    [
        ("0,1,2,3", 2, ["0,1", "2,3"]),
        ("7, 3", 2, ["7", "3"]),
        ("GPU-8932f937,GPU-1be1ea13", 2, ["GPU-8932f937", "GPU-1be1ea13"]),
        ("0,1,-1,2", 2, ["0", "1"]),
    ],
)
def test_visible_gpus_are_shared(
    monkeypatch: pytest.MonkeyPatch, visible: str, processes: int, expected: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert shares(processes, "gpu", "CUDA_VISIBLE_DEVICES") == expected


@pytest.mark.parametrize(("reported", "expected"), [("echo 0; echo 1", ["0", "1"]), ("exit 9", ["0", "1", "2", "3"])])
def test_gpus_are_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reported: str, expected: list[str]) -> None:
    """By the driver's tool, which knows what a container may use, or by the device files."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{reported}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(local_processes.glob, "glob", lambda pattern: [pattern] * 4)
    assert shares(len(expected), "gpu", "CUDA_VISIBLE_DEVICES") == expected


@pytest.mark.parametrize(("visible", "fix"), [("0,1,2", "--processes 1"), ("", "cpu:2"), ("-1", "cpu:2")])
def test_gpus_that_cannot_be_shared(monkeypatch: pytest.MonkeyPatch, visible: str, fix: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    choose_devices("gpu")
    with raises(ConfigError, f"--processes 2 use {fix}"):
        process_environments(2, "gpu")


def test_one_process_drives_all_tpu_chips() -> None:
    choose_devices("tpu")
    with raises(ConfigError, "--processes 2 tpu --devices cpu:2"):
        process_environments(2, "tpu")


def test_one_of_several_processes_starts_none(monkeypatch: pytest.MonkeyPatch) -> None:
    choose_devices("cpu:2")
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    with raises(ConfigError, "--processes 2 JAX_PROCESS_ID=1 unset"):
        process_environments(2, "cpu:2")
