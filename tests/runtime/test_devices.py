"""What JAX says of platforms that are not here is a line each."""

import logging

from jaxinfra.runtime.devices import _capture_logs


def test_a_plugin_that_cannot_be_used_is_one_line(caplog) -> None:
    """JAX logs it with two tracebacks, though another platform is found."""
    logger = logging.getLogger("tests.plugins")
    with _capture_logs(logger.name) as said:
        try:
            raise RuntimeError("no\n  such library")
        except RuntimeError:
            logger.exception("plugin %s failed", "x")
        assert len(said) == 1 and not caplog.records
    assert caplog.text.count("\n") == 1
    assert caplog.messages == ["plugin x failed: no such library"]
