"""`python -m launch runs [ROOT]`: lists runs with their state, progress and results; uses no devices.

With `--place` it lists the machines of runs in a cloud, which `cli.places.listing` does.
"""

import argparse
import importlib
import os

from jaxinfra.cli.sweep_table import print_sweep, read_sweep
from jaxinfra.command import COMMAND, command_line
from jaxinfra.errors import ConfigError
from jaxinfra.track.console import fitted_table, print_table, stdout_console
from jaxinfra.track.formatting import format_age, format_count, format_metric
from jaxinfra.track.runs import RunOverview, differences, list_runs

_COLUMNS = ("run", "state", "step", "loss", "differs in", "best validation", "age", "units/s", "goodput")
"""The most important first: a terminal that is too narrow for all leaves out the last ones."""


def run(options: argparse.Namespace) -> None:
    """Prints a row for each run, newest first."""
    root = options.root
    if options.place:
        if root != "runs":
            raise ConfigError(f"{root}: --place lists machines, of all runs; leave {root} out, or leave out --place")
        importlib.import_module("jaxinfra.cli.places.listing").run(options)
        return
    for option in ("project", "zone", "prices"):
        if value := getattr(options, option):
            raise ConfigError(f"--{option} {value}: is for machines of a cloud; add --place tpu-vm or --place gce")
    if (sweep := read_sweep(root)) is not None:
        print_sweep(root, sweep, plots=True)
        return
    runs = list_runs(root) if root != "runs" or os.path.exists(root) else []
    if not runs:
        example = "configs/quickstart.py" if os.path.exists("configs/quickstart.py") else "init"
        print(f"{root}: no runs yet; begin with {COMMAND} {example}, or {COMMAND} new PATH for your own text")
        return
    console, rows, texts = stdout_console(), [*map(_cells, runs, differences(runs))], ("run", "state", "differs in")
    print_table(console, fitted_table(console, _COLUMNS, rows, texts=texts, wrapped="differs in"))
    healthy = [each for each in runs if not each.state.startswith("damaged")]
    for each in runs:
        if each not in healthy:
            print(f"{each.path}: {each.state}")
    if healthy:
        print(f"next: {command_line('report', healthy[0].path)}")


def _cells(run: RunOverview, differs: str) -> list[str]:
    state = run.state.partition(":")[0]  # what is damaged stands below the table
    steps = f"{run.completed_steps:,}" if run.total_steps is None else f"{run.completed_steps:,}/{run.total_steps:,}"
    loss, best = ("" if loss is None else format_metric(loss) for loss in (run.loss, run.best_validation))
    speed = "" if run.units_per_s is None else format_count(run.units_per_s)
    goodput = "" if run.goodput is None else f"{run.goodput:.0%}"
    return [run.path, state, steps, loss, differs, best, format_age(run.age_s), speed, goodput]
