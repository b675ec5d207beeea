"""Benchmarks against hand-written code and other libraries: `python -m launch bench NAME` runs the module NAME."""

from collections.abc import Iterable

DEFAULT_CONFIG = "configs/bench_small.py"
"""Config that is timed by default."""


def merge_overrides(overrides: Iterable[str]) -> list[str]:
    """Keeps only the last override of each field."""
    return list({override.partition("=")[0]: override for override in overrides}.values())
