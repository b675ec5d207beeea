"""Times the framework against hand-written code, and compares its meshes with one device.

The commands `bench` and `parity` are its users; nothing else imports it.
"""

from collections.abc import Iterable

CONFIG = "configs/bench_small.py"
"""The model that is timed unless another is named."""

PARITY_CONFIGS = ("configs/parity_dense.py", "configs/parity_moe.py")
"""The models that are compared on every mesh unless others are named."""


def last(overrides: Iterable[str]) -> list[str]:
    """Keeps the last of the changes to each field."""
    return list({change.partition("=")[0]: change for change in overrides}.values())
