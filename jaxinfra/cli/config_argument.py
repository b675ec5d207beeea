"""The config that a command line names: a file and overrides."""

import argparse

from jaxinfra.command import COMMAND
from jaxinfra.config import Loaded, load
from jaxinfra.run import Run, with_fingerprint_name


def load_config(options: argparse.Namespace) -> Loaded[Run]:
    """The config with its overrides, and a name of its own where they change its numbers; see `config.load`."""
    file = load(options.config, (), Run, options.imports)
    if not options.overrides:
        return file
    return with_fingerprint_name(load(options.config, options.overrides, Run, options.imports), file.run)


def prepare_command(options: argparse.Namespace, run: Run) -> str:
    """The command that makes the data of a run."""
    changed = [each for each in options.overrides if each.startswith("data.")]
    recipes = run.data.recipes
    imports = dict.fromkeys(recipes.values()) if options.config.endswith(".json") else ()
    words = [options.config, *(f"--import {path}" for path in imports)] if recipes else ["RECIPE"]
    return " ".join([f"{COMMAND} data prepare", *words, *changed])
