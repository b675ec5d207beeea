"""What is compared here are sums; both sides are compiled alike, and quickly."""

import pytest


@pytest.fixture(autouse=True)
def compiled_quickly(quick_compiles: None) -> None:
    """All tests here compile without most optimizations."""
