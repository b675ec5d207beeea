"""What a compiler reads of the environment is not left to the next test; what it made is kept on disk."""

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def environment_is_left() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def compilations_are_kept(compile_cache: None) -> None:
    """All tests here share what was compiled, with the developer's last run too."""
