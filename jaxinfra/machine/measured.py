"""Keeps what was measured on this machine beside the compile cache: the peak of its CPU, and the steps of its runs."""

import json
import logging
import math
from importlib.metadata import version
from pathlib import Path

from jaxinfra.machine.compile_cache import user_folder
from jaxinfra.machine.environment import cpu_model, usable_cores
from jaxinfra.storage.atomic import write_bytes_atomic

FILE = "measured.json"
_log = logging.getLogger(__name__)


def cpu_name() -> str:
    """Names what the speed of the CPU depends on: its model, the cores that this process may use, and the compiler."""
    quota = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of CPU time in a period
    limit = quota.read_text().split()[0] if quota.exists() else "max"
    limited = "" if limit == "max" else f", {limit} us of CPU time"
    return f"{cpu_model()}, {usable_cores()} cores{limited}, jaxlib {version('jaxlib')}"


def read_measured(name: str) -> float | None:
    """Returns what was kept last under a name, a number above 0; None if there is none, or the file is damaged."""
    return _read().get(name)


def keep_measured(name: str, value: float) -> None:
    """Keeps a number; a folder that cannot be written is only warned of."""
    path = user_folder().with_name(FILE)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes_atomic(path, json.dumps({**_read(), name: float(value)}, indent=1).encode())
    except OSError as error:
        _log.warning("%s: %s; what was measured is not kept", path, error.strerror)


def _read() -> dict[str, float]:
    try:
        values = json.loads(user_folder().with_name(FILE).read_text(encoding="utf-8"))
        return {name: value for name, value in values.items() if isinstance(value, float) and 0 < value < math.inf}
    except (OSError, ValueError, AttributeError):  # it is measured anew
        return {}
