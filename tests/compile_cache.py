"""A cache in `.cache/compiled` for programs that tests compile ahead of time."""

from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / ".cache" / "compiled"


@pytest.fixture
def compile_cache(all_optimizations: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads programs from the cache, if they were compiled before."""
    from jaxinfra.plan import aot
    from jaxinfra.plan.compiled_cache import cached

    monkeypatch.setattr(aot, "compile_lowered", cached(aot.compile_lowered, FOLDER))
