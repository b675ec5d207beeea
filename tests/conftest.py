"""Every test sees eight emulated CPU devices; all share one compile cache."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxinfra.runtime import emulated

pytest_plugins = ["tests.compile_cache", "tests.servers.fixtures", "tests.stores"]

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "8",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    "XLA_FLAGS": emulated.environment(8)["XLA_FLAGS"],
}
# JAX reads these when it is imported, in this process and in those that tests start.
os.environ.update(ENVIRONMENT)


@pytest.fixture
def repo_root() -> Path:
    return ROOT


@pytest.fixture
def quick_compiles() -> Iterator[None]:
    """Compiles without most of LLVM's optimizations, which toy programs wait for much longer than they run.

    XLA's own passes, and so collectives and memory, stay as they are. Bits do not.
    """
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def mesh_context_is_left() -> Iterator[None]:
    """A mesh set by one test must not be seen by the next."""
    yield
    import sys

    if "jax" in sys.modules:
        import jax

        assert jax.sharding.get_abstract_mesh().empty, "the test left a mesh set"
