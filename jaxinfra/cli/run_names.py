"""Finds the runs that a command line names: the name of a config also names the newest run of it with overrides."""

import argparse
import os
import re
from pathlib import Path

from jaxinfra.config.source import RECORD_FILE, runs_of_config
from jaxinfra.storage.location import is_remote

_FIELDS = ("run_dir", "runs", "config", "left", "right")  # of options: where a run can be named


def resolve(options: argparse.Namespace) -> list[str]:
    """Replaces names of configs by directories of runs; returns a line about each, for the user.

    A run with overrides that change its results is in `NAME-` and six digits (`run.with_fingerprint_name`). `prune`
    deletes, so it takes the exact name alone.
    """
    notes: list[str] = []
    for field in _FIELDS if getattr(options, "action", None) != "prune" else ():
        words = getattr(options, field, None)
        if isinstance(words, list):
            setattr(options, field, [_newest(word, notes) for word in words])
        elif words is not None:
            setattr(options, field, _newest(words, notes))
    return notes


def _newest(word: str, notes: list[str]) -> str:
    """Returns the run that a word names, with its `@STEP`; the word itself if it names a run, a file or nothing."""
    word = os.path.expanduser(word)
    name, at, step = word.rpartition("@") if re.search("@[0-9]+$", word) else (word, "", "")
    path = Path(name)
    is_run = (path / RECORD_FILE).exists() or (path / "checkpoints").exists()
    if is_run or is_remote(word) or not (found := runs_of_config(path)):
        return word
    which = "only run" if len(found) == 1 else f"newest of the {len(found)} runs"
    notes.append(f"{name}: taking {found[0]}, the {which} of this config with overrides")
    return f"{found[0]}{at}{step}"
