"""A log message of JAX about an unusable platform becomes one line."""

import logging

import pytest

from jaxinfra.errors import ConfigError
from jaxinfra.runtime.devices import _capture_logs, local_devices
from tests.refusals import raises


def test_unusable_plugin_is_one_line(caplog) -> None:
    """JAX logs it with two tracebacks, even if another platform is usable."""
    logger = logging.getLogger("tests.plugins")
    with _capture_logs(logger.name) as records:
        try:
            raise RuntimeError("no\n  such library")
        except RuntimeError:
            logger.exception("plugin %s failed", "x")
        assert len(records) == 1 and not caplog.records
    assert caplog.text.count("\n") == 1
    assert caplog.messages == ["plugin x failed: no such library"]


@pytest.mark.parametrize(("name", "value"), [("SLURM_STEP_NUM_TASKS", "8"), ("TPU_WORKER_HOSTNAMES", "t-0,t-1")])
def test_several_processes_of_a_scheduler_are_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would train the same run."""
    monkeypatch.setenv(name, value)
    with raises(ConfigError, f"{name}={value} not supported"):
        local_devices()
    # libtpu writes a sentence where it finds no host.
    monkeypatch.setenv(name, "1" if name.startswith("SLURM") else "could not determine hosts, please set it")
    assert local_devices()
