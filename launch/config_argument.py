"""The arguments that name a config: a file and overrides."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxinfra.config import Loaded
    from jaxinfra.run import Run


def add(parser: argparse.ArgumentParser) -> None:
    """Adds CONFIG and its overrides."""
    parser.add_argument("config", metavar="CONFIG", help="a config file, or the run.json of a run")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="changes to it, such as train.steps=400")


def loaded(options: argparse.Namespace) -> "Loaded[Run]":
    """The config with its overrides, and a name of its own where they change its numbers.

    Raises:
        ConfigError: the file or an override is wrong.
    """
    from jaxinfra.config import load
    from jaxinfra.run import Run, named

    file = load(options.config, root=Run)
    return named(load(options.config, options.overrides, root=Run), file.run) if options.overrides else file
