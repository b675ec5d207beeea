"""`python -m launch model rollback models:/NAME`: moves the alias back to the version that it named before."""

import argparse

from jaxinfra.cli.model.promote import open_registry
from jaxinfra.registry.promotion import described, roll_back


def run(options: argparse.Namespace) -> None:
    """Moves the alias, and prints both versions."""
    registry = open_registry(options.registry, options.target)
    before, left = roll_back(registry, options.leaving)
    print(f"{registry.target}: {described(before)}, in place of version {left.number}, {left.source}")
