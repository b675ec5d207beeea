"""Loads the config that a command line names by a file and overrides."""

import argparse

from jaxinfra.command import command_line
from jaxinfra.config import Loaded, load_file
from jaxinfra.config.source import find_record
from jaxinfra.run import Run, with_fingerprint_name


def load_config(options: argparse.Namespace) -> Loaded[Run]:
    """Loads the config and applies the overrides; a run whose results they change gets a name of its own."""
    file = load_file(options.config, Run, options.imports)
    return with_fingerprint_name(file.with_overrides(options.overrides), file.run)


def prepare_command(options: argparse.Namespace, run: Run) -> str:
    """Returns the command that prepares the data of a run."""
    overrides = [override for override in options.overrides if override.startswith("data.")]
    recipes = run.data.recipes
    # A record may name a recipe's file only if --import allows it.
    imports = () if find_record(options.config) is None else dict.fromkeys(recipes.values())
    words = [options.config, *(word for path in imports for word in ("--import", path))] if recipes else ["RECIPE"]
    return command_line("data", "prepare", *words, *overrides)
