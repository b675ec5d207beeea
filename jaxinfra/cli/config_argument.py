"""Loads the config that a command line names by a file and overrides."""

import argparse
import logging
from collections.abc import Sequence

from jaxinfra.command import command_line
from jaxinfra.config import Loaded, load_file
from jaxinfra.config.source import find_record
from jaxinfra.run import Run, with_fingerprint_name

_log = logging.getLogger(__name__)


def load_config(options: argparse.Namespace) -> Loaded[Run]:
    """Loads the config and applies the overrides; a run whose results they change gets a name of its own."""
    file = load_file(options.config, Run, options.imports)
    overrides = [*options.overrides, *shorter_warmup(file.run, options.overrides)]
    return with_fingerprint_name(file.with_overrides(overrides), file.run)


def shorter_warmup(file: Run, overrides: Sequence[str]) -> list[str]:
    """Returns an override for a warmup of the config file that is longer than `train.steps` of the command line.

    So `train.steps=5` is enough to try a config. It logs a warning.
    """
    steps = next((text for path, _, text in (each.partition("=") for each in overrides) if path == "train.steps"), "")
    schedule_is_set = any(each.startswith("optim.schedule") for each in overrides)
    if schedule_is_set or not steps.isdecimal() or not any(file.optim.schedule.problems_in_run(int(steps), "")):
        return []
    override = f"optim.schedule.warmup_steps={int(steps) // 10}"
    warmup_steps = file.optim.schedule.warmup_steps
    _log.warning("warmup of %d steps does not fit into train.steps=%s; using %s", warmup_steps, steps, override)
    return [override]


def prepare_command(options: argparse.Namespace, run: Run) -> str:
    """Returns the command that prepares the data of a run."""
    overrides = [override for override in options.overrides if override.startswith("data.")]
    recipes = run.data.recipes
    # A record may name a recipe's file only if --import allows it.
    imports = () if find_record(options.config) is None else dict.fromkeys(recipes.values())
    words = [options.config, *(word for path in imports for word in ("--import", path))] if recipes else ["RECIPE"]
    return command_line("data", "prepare", *words, *overrides)
