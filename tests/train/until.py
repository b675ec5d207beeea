"""Waits for what running processes bring about."""

import subprocess
import time
from collections.abc import Callable


def until(condition: Callable[[], object], *processes: subprocess.Popen) -> None:
    """Returns once the condition is true; fails if a process ends before that, or after ten minutes."""
    deadline_s = time.monotonic() + 600
    while not condition():
        assert all(each.poll() is None for each in processes), [each.communicate() for each in processes]
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
