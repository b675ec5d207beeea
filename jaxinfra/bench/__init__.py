"""Benchmarks against hand-written code and other libraries, and the comparison of meshes with one device.

Only the commands `bench` and `parity` import it.
"""

from collections.abc import Iterable

DEFAULT_CONFIG = "configs/bench_small.py"
"""Config that is timed by default."""

PARITY_CONFIGS = ("configs/parity_dense.py", "configs/parity_moe.py")
"""Configs that are compared on every mesh by default."""


def merge_overrides(overrides: Iterable[str]) -> list[str]:
    """Keeps only the last override of each field."""
    return list({override.partition("=")[0]: override for override in overrides}.values())
