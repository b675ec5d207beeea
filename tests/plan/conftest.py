import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def restore_environment() -> Iterator[None]:
    """Undoes what `set_up_compiler` sets."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def use_compile_cache(compile_cache: None) -> None:
    """Shares compiled programs between tests and test runs."""
