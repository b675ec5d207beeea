"""Every test sees eight emulated CPU devices; all share one compile cache."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxinfra.machine import emulation
from launch.arguments import add_commands

pytest_plugins = ["tests.compile_cache", "tests.servers.fixtures", "tests.stores"]

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {
    # An editable install leaves `tests` and `launch` off the path; tests start processes in other folders.
    "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "8",
    # Toy programs wait for LLVM's optimizations much longer than they run. XLA's own passes, and so collectives and
    # memory, stay as they are.
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    "XLA_FLAGS": emulation.emulation_env(8)["XLA_FLAGS"],
    # Else each process that is started by itself would load its config twice, to find that of its run.
    "JAXINFRA_SECRET": "of all tests",
    # Ray kills its workers when the whole machine is short of memory, whoever takes it: here, other tests do.
    "RAY_memory_monitor_refresh_ms": "0",
    # Its workers are at 15 by default: beside other tests they would get no time for minutes.
    "RAY_worker_niceness": "0",
}
# JAX reads these when it is imported, in this process and in those that tests start.
os.environ.update(ENVIRONMENT)

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.pop("LD_PRELOAD", None)  # jemalloc (Makefile): what tests start has the malloc of a user's process

for number in (signal.SIGHUP, signal.SIGINT):
    if signal.getsignal(number) is signal.SIG_IGN:
        # As under nohup and `... &`. Processes that tests start would ignore it, too; a handler is not passed on.
        signal.signal(number, lambda number, frame: None)

add_commands()  # tests call those of a clone in this process, too


class FailuresAtOnce:
    """Prints a test that fails when it fails: a session that is ended from outside prints no summary."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Is called in the process that prints, with the reports of all workers."""
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and terminal is not None:
            errors = [line for line in report.longreprtext.splitlines() if line.startswith("E ")]
            why = "; ".join(errors[:3])[:500]
            terminal.write_line(f"\nfailed after {report.duration:.0f} s: {report.nodeid}: {why}")


def pytest_configure(config: pytest.Config) -> None:
    """Prints failures in the first process alone."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        config.pluginmanager.register(FailuresAtOnce(config))


SLOW_S = 10
"""Of a slow test that does not say how long it takes."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts slow modules first, the longest first, and shares them out over the workers.

    xdist gives each worker an equal, contiguous part of the list; an idle worker takes from the end of another's. So
    each part begins with its share of the slow modules and ends with fast tests. The tests of a module stay together,
    for the fixtures that they share. `@pytest.mark.slow(SECONDS)` says about how long a test takes.
    """
    slow: dict[str, list[pytest.Item]] = {}
    fast: list[pytest.Item] = []
    for item in items:
        if item.get_closest_marker("slow"):
            slow.setdefault(item.nodeid.partition("::")[0], []).append(item)
        else:
            fast.append(item)
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    parts: list[list[pytest.Item]] = [[] for _ in range(workers)]
    for module in sorted(slow, key=lambda module: -sum(map(_seconds, slow[module]))):
        least = min(parts, key=lambda part: sum(map(_seconds, part)))
        least += sorted(slow[module], key=lambda item: -_seconds(item))
    size = len(items)
    for number, part in enumerate(parts):
        room = max(0, size // (workers - number) - len(part))
        part += fast[:room]
        del fast[:room]
        size -= len(part)
    items[:] = [item for part in [*parts, fast] for item in part]


def _seconds(item: pytest.Item) -> float:
    marker = item.get_closest_marker("slow")
    assert marker is not None
    return marker.args[0] if marker.args else SLOW_S


@pytest.fixture
def repo_root() -> Path:
    return ROOT


@pytest.fixture
def all_optimizations(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compiles as a user's program is: for what real compilers make of a program, and where steps are many."""
    import jax

    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True)
def mesh_context_is_left() -> Iterator[None]:
    """A mesh set by one test must not be seen by the next."""
    yield
    import sys

    if "jax" in sys.modules:
        import jax

        assert jax.sharding.get_abstract_mesh().empty, "the test left a mesh set"
