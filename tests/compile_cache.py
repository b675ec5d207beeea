"""Compiled programs of tests: a cache in `.cache/compiled`, and a bound on those in memory; less to search there."""

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / ".cache" / "compiled"
MOST_REGIONS = 20_000
"""Of memory, after which a worker forgets its programs; Linux refuses a process more than 65,530 (vm.max_map_count)."""


def pytest_collection_finish() -> None:
    """Leaves tests and what they import out of the search for garbage: it took a tenth of a worker's time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def compile_cache(all_optimizations: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads programs from the cache, if they were compiled before."""
    from jaxinfra.plan import aot
    from jaxinfra.plan.compiled_cache import cached

    monkeypatch.setattr(aot, "compile_lowered", cached(aot.compile_lowered, FOLDER))


@pytest.fixture(scope="module", autouse=True)
def programs_are_forgotten() -> Iterator[None]:
    """Frees compiled programs between modules: each takes about ten regions, and a worker runs a thousand tests."""
    yield
    if "jax" in sys.modules and _regions() > MOST_REGIONS:
        import jax

        jax.clear_caches()
        gc.collect()


def _regions() -> int:
    maps = Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0
