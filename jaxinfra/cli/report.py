"""`python -m launch report RUN [RUN ...]`: writes the page of a run, or one page that compares several."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jaxinfra.errors import ConfigError
from jaxinfra.storage.lock import is_locked
from jaxinfra.track.report import MAX_RUNS, REPORT_FILE, read_run, write_page


def run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Writes the page and prints its path."""
    folders = list(dict.fromkeys(Path(name) for name in options.runs))
    if len(folders) > MAX_RUNS:
        raise ConfigError(f"report: {len(folders)} runs, a page compares up to {MAX_RUNS}; name fewer")
    runs = [read_run(folder, is_running=folder.is_dir() and is_locked(folder)) for folder in folders]
    if len({each.name for each in runs}) < len(runs):  # such as runs of one config in two roots
        runs = [replace(each, name=str(folder)) for each, folder in zip(runs, folders, strict=True)]
    default = folders[0] / REPORT_FILE if len(folders) == 1 else folders[0].parent / "comparison.html"
    path = write_page(runs, options.output or default)
    print(f"wrote {path}; open it in a browser")
    return 0
