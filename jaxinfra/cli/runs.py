"""`python -m launch runs [ROOT]`: lists runs with their state, progress and results; uses no devices."""

import argparse

from rich.table import Column

from jaxinfra.command import COMMAND
from jaxinfra.track.console import fitted_table, print_table, stdout_console
from jaxinfra.track.formatting import format_age, format_count
from jaxinfra.track.runs import RunOverview, list_runs
from jaxinfra.track.variants import differences

_COLUMNS = {
    "run": Column("run"),
    "state": Column("state"),
    "step": Column("step", justify="right"),
    "loss": Column("loss", justify="right"),
    "differs in": Column("differs in", overflow="fold"),
    "best validation": Column("best validation", justify="right"),
    "age": Column("age", justify="right"),
    "units/s": Column("units/s", justify="right"),
    "goodput": Column("goodput", justify="right"),
}
"""The most important first: a terminal that is too narrow for all leaves out the last ones."""


def run(options: argparse.Namespace) -> None:
    """Prints a row for each run, newest first; a column without any text is left out."""
    root = options.root
    runs = list_runs(root)
    if not runs:
        print(f"{root}: no runs yet; start one with {COMMAND} CONFIG")
        return
    rows = [_cells(each, differs) for each, differs in zip(runs, differences(runs), strict=True)]
    columns = [(column, [row[name] for row in rows]) for name, column in _COLUMNS.items()]
    console = stdout_console()
    print_table(console, fitted_table(console, [(column, cells) for column, cells in columns if any(cells)]))
    healthy = [each for each in runs if not each.state.startswith("damaged")]
    for each in runs:
        if each not in healthy:
            print(f"{each.path}: {each.state}")
    if healthy:
        print(f"next: {COMMAND} report {healthy[0].path}")


def _cells(run: RunOverview, differs: str) -> dict[str, str]:
    """Returns the text of each column."""
    total = "" if run.total_steps is None else f"/{run.total_steps:,}"
    return {
        "run": run.path,
        "state": run.state.partition(":")[0],  # a damaged one says what is wrong below the table
        "step": f"{run.completed_steps:,}{total}",
        "loss": _loss(run.loss),
        "differs in": differs,
        "best validation": _loss(run.best_validation),
        "age": format_age(run.age_s),
        "units/s": "" if run.units_per_s is None else format_count(run.units_per_s),
        "goodput": "" if run.goodput is None else f"{run.goodput:.0%}",
    }


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
