"""A log message of JAX about an unusable platform becomes one line."""

import logging

from jaxinfra.runtime.devices import _capture_logs


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
