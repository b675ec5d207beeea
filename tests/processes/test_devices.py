"""A log message of JAX about an unusable platform becomes one line."""

import logging

import jax
import pytest

from jaxinfra.errors import ConfigError
from jaxinfra.processes.devices import _capture_logs, all_devices
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


def test_processes_that_jax_has_connected_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would not notice the loss of one of them."""
    assert all_devices()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with raises(ConfigError, "2 jaxinfra.join()"):
        all_devices()
