"""Finds the runs that a command line names: the name of a config also names the newest run of it with overrides."""

import argparse
import os
import re
from pathlib import Path

from jaxinfra.config.source import RECORD_FILE, runs_of_config


def resolve(options: argparse.Namespace) -> list[str]:
    """Replaces names of configs by directories of runs; returns a line about each.

    A start and `prune` take exact names alone: the newest run may be another one in the next start or process.
    """
    notes: list[str] = []
    if options.command == "train" or getattr(options, "action", None) == "prune":
        return notes

    def newest(word: str) -> str:
        name, at, step = word.rpartition("@") if re.search("@[0-9]+$", word) else (word, "", "")
        is_run = any(os.path.exists(os.path.join(name, each)) for each in (RECORD_FILE, "checkpoints"))
        if is_run or not (found := runs_of_config(Path(name))):
            return word
        runs = f"{len(found)} run{'s' * (len(found) > 1)} of this config with overrides"
        notes.append(f"{name}: taking {found[0]}, the newest of {runs}")
        if word in options.argv:
            options.argv[options.argv.index(word)] = f"{found[0]}{at}{step}"  # for the processes that this one starts
        return f"{found[0]}{at}{step}"

    for field in ("run_dir", "adapters", "runs", "config", "left", "right", "check", "fit"):
        if (value := getattr(options, field, None)) is not None:
            setattr(options, field, [*map(newest, value)] if isinstance(value, list) else newest(value))
    return notes
