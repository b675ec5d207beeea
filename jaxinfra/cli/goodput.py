"""`python -m launch goodput RUN [RUN ...]`: says where the time of runs went, over all starts; uses no devices."""

import argparse
from dataclasses import asdict
from typing import Any

from rich.table import Column

from jaxinfra.errors import ConfigError
from jaxinfra.storage import outputs
from jaxinfra.track.console import print_table, stdout_console, titled_table
from jaxinfra.track.formatting import format_counts, format_duration, format_energy, format_number, format_percent
from jaxinfra.track.goodput import CLASSES, GOODPUT_FILE, Goodput, Model, account, model, read_ledger, total
from jaxinfra.track.runs import local_files


def run(options: argparse.Namespace) -> None:
    """Prints a table for each run, and one for all of them; with `--mtbf` also what to expect."""
    locations = list(dict.fromkeys(name.rstrip("/") for name in options.runs))
    runs = {location: _read(location) for location in locations}
    if len(runs) > 1:
        runs[f"all {len(runs)} runs"] = total([*runs.values()])
    result: dict[str, Any] = {}
    for name, each in runs.items():
        expected = None if options.mtbf is None else model(each, options.mtbf)
        result[name] = _values(each, expected)
        _print(name, each)
        if options.mtbf is not None:
            _print_model(expected)
    outputs.write_json(options.json, result)


def _read(location: str) -> Goodput:
    with local_files(location) as folder:
        attempts = read_ledger(folder / GOODPUT_FILE)
    if not attempts:
        raise ConfigError(f"{location}: no {GOODPUT_FILE} there; name the directory of a run that has started")
    return account(attempts)


def _values(run: Goodput, expected: Model | None) -> dict[str, Any]:
    values = {"attempts": run.attempts, "wall_s": run.wall_s, "goodput": run.fraction, "seconds": dict(run.seconds)}
    values["stops"] = [{"step": step, "reason": reason} for step, reason in run.stops]
    values["processes"] = [*run.processes]
    if run.joules is not None:
        values |= {"joules": run.joules, "planned_joules": run.planned_joules}
    return values if expected is None else values | {"model": asdict(expected)}


def _print(name: str, run: Goodput) -> None:
    table = titled_table(name, "", *(Column(each, justify="right") for each in ("time", "seconds", "share")))
    for key, label in CLASSES.items():
        if (seconds := run.seconds.get(key)) is not None:
            table.add_row(label, format_duration(seconds), f"{seconds:,.1f}", format_percent(seconds / run.wall_s))
    table.add_section()
    starts = f"all, {run.attempts} start{'s' * (run.attempts > 1)}"
    table.add_row(starts, format_duration(run.wall_s), f"{run.wall_s:,.1f}", "100.0%")
    print_table(stdout_console(), table)
    if run.processes:
        print(f"processes of the starts: {format_counts(run.processes)}")
    for step, reason in run.stops:
        print(f"one start stopped after step {step} by {reason}")
    if line := format_energy(run.joules, run.planned_joules):
        print(line)
    print(f"goodput {format_percent(run.fraction)}: time of steps that were not lost, of the whole\n")


def _print_model(expected: Model | None) -> None:
    if expected is None:
        print("no model: it needs a run that has saved after its first step\n")
        return
    print(
        f"with a failure every {format_duration(expected.mtbf_s)} on average: goodput "
        f"{100 * expected.goodput:.2f}% without waits and evaluations; best {100 * expected.best_goodput:.2f}%\n"
        f"  a save stalls {format_number(expected.stall_s)} s, a restart takes {format_number(expected.restart_s)} s\n"
        f"  time between saves {format_number(expected.interval_s)} s; best "
        f"{format_number(expected.best_interval_s)} s\n"
    )
