"""`python -m launch runs [ROOT]`: lists runs with their state, progress and results; uses no devices."""

import argparse
import os

from rich.table import Column

from jaxinfra.command import COMMAND, command_line
from jaxinfra.track.console import stdout_console, titled_table
from jaxinfra.track.formatting import format_age, format_count
from jaxinfra.track.runs import RunOverview, list_runs

_NUMBERS = ("step", "loss", "best validation", "units/s", "goodput", "age")


def run(options: argparse.Namespace) -> None:
    """Prints a row for each run, newest first."""
    root = options.root
    runs = list_runs(root) if root != "runs" or os.path.exists(root) else []
    if not runs:
        example = "configs/quickstart.py" if os.path.exists("configs/quickstart.py") else "init"
        print(f"{root}: no runs yet; begin with {COMMAND} {example}, or {COMMAND} new PATH for your own text")
        return
    table = titled_table("", "run", "state", *(Column(name, justify="right") for name in _NUMBERS))
    for each in runs:
        table.add_row(*_cells(each))
    stdout_console().print(table)
    if healthy := [each for each in runs if not each.state.startswith("damaged")]:
        print(f"next: {command_line('report', healthy[0].path)}")


def _cells(run: RunOverview) -> list[str]:
    steps = f"{run.completed_steps:,}" if run.total_steps is None else f"{run.completed_steps:,}/{run.total_steps:,}"
    losses = ["" if loss is None else f"{loss:.4f}" for loss in (run.loss, run.best_validation)]
    speed = "" if run.units_per_s is None else format_count(run.units_per_s)
    goodput = "" if run.goodput is None else f"{run.goodput:.0%}"
    return [run.path, run.state, steps, *losses, speed, goodput, format_age(run.age_s)]
