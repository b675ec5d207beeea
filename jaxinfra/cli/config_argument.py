"""Loads the config that a command line names by a file and overrides."""

import argparse

from jaxinfra.command import COMMAND
from jaxinfra.config import Loaded, load
from jaxinfra.run import Run, with_fingerprint_name


def load_config(options: argparse.Namespace) -> Loaded[Run]:
    """Loads the config and applies the overrides; a run whose results they change gets a name of its own."""
    file = load(options.config, (), Run, options.imports)
    if not options.overrides:
        return file
    return with_fingerprint_name(load(options.config, options.overrides, Run, options.imports), file.run)


def prepare_command(options: argparse.Namespace, run: Run) -> str:
    """Returns the command that prepares the data of a run."""
    overrides = [override for override in options.overrides if override.startswith("data.")]
    recipes = run.data.recipes
    # A run.json may name a recipe's file only if --import allows it.
    imports = dict.fromkeys(recipes.values()) if options.config.endswith(".json") else ()
    words = [options.config, *(f"--import {path}" for path in imports)] if recipes else ["RECIPE"]
    return " ".join([f"{COMMAND} data prepare", *words, *overrides])
