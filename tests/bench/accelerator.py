"""`python -m launch bench accelerator`: what a new kind of device does, in ten minutes and one file.

For somebody with a GPU or a TPU slice: train steps, kernels, collectives, parity of meshes, saving, and what it all ran
on. Nothing is downloaded; tokens are random. The cheap parts come first. A part has a budget of seconds, and what does
not fit is a row that says so. The file is written after every row, so a benchmark that was stopped has one, too.
"""

import argparse
import sys
import time
import traceback
from collections.abc import Mapping
from typing import Any

from jaxinfra.errors import JaxinfraError, PeerLostError, Preempted
from jaxinfra.processes.devices import all_devices
from jaxinfra.processes.peers import current_peers
from jaxinfra.storage import outputs
from tests.bench import (
    accelerator_collectives,
    accelerator_environment,
    accelerator_kernels,
    accelerator_models,
    accelerator_parity,
    accelerator_save,
)
from tests.bench.accelerator_timing import Case, NotMeasuredError, Part, Setting
from tests.bench.table import BenchmarkResult, Columns, TableRow, format_table

DEFAULT_FILE = "accelerator.json"
FAILED_WAIT_S = 120.0
"""How long the processes wait for each other after a case: one that failed alone ends the benchmark."""

PARTS: Mapping[str, Part] = {
    "environment": accelerator_environment.PART,
    "collectives": accelerator_collectives.PART,
    "kernels": accelerator_kernels.PART,
    "save": accelerator_save.PART,
    "parity": accelerator_parity.PART,
    "models": accelerator_models.PART,
}
"""The parts in their order, the cheap ones first."""


class Report:
    """The rows so far, in process 0 also in a file."""

    def __init__(self, file: str | None, environment: Mapping[str, str]) -> None:
        self._file, self._environment = file, environment
        self.parts: dict[str, dict[str, Any]] = {}
        self.failures: list[dict[str, str]] = []

    def add(self, part: str, row: TableRow, seconds: float) -> None:
        """Adds a row, and the seconds that the part has taken."""
        found = self.parts.setdefault(part, {"rows": [], "seconds": 0.0})
        found["rows"].append(dict(row))
        found["seconds"] = round(seconds, 1)
        self.write()

    def add_failure(self, part: str, case: Case, error: Exception) -> None:
        """Keeps the traceback of a case that has failed."""
        text = "".join(traceback.format_exception(error))
        self.failures.append({"part": part, "case": case.title, "traceback": text})
        print(text, file=sys.stderr, flush=True)

    def measurements(self) -> dict[str, Any]:
        """Returns the contents of the file besides the environment."""
        return {"parts": self.parts, "failures": self.failures}

    def write(self) -> None:
        """Writes the file."""
        outputs.write_json(self._file, {**self.measurements(), "environment": dict(self._environment)})


def measure_case(report: Report, part: str, case: Case) -> TableRow:
    """Measures a case; one that cannot be measured, or fails, is a row that says why.

    A failure of one process alone leaves the others in a collective operation: then all end.
    """
    peers, row, reason = current_peers(), dict[str, Any](), None
    try:
        row = dict(case.measure())
    except (PeerLostError, Preempted):
        raise
    except (NotMeasuredError, JaxinfraError) as error:
        reason = str(error)
    except Exception as error:
        peers.raise_cause_of(error)
        report.add_failure(part, case, error)
        reason = f"it failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    reasons = [each for each in peers.gather(reason, wait_s=FAILED_WAIT_S) if each is not None]
    return {"case": case.title, **row, "note": f"not measured: {reasons[0]}" if reasons else None}


def measure_part(report: Report, name: str, setting: Setting, shows: bool) -> None:
    """Measures the cases of a part until its budget is spent, and prints its table."""
    part, peers = PARTS[name], current_peers()
    start_s, longest_s = time.perf_counter(), 0.0
    rows = list[TableRow]()
    for case in part.cases(setting):
        spent_s = time.perf_counter() - start_s
        if peers.broadcast(bool(rows) and spent_s + longest_s > part.budget_s):
            needed = f"may take {longest_s:.0f} s, and {max(0.0, part.budget_s - spent_s):.0f} s are left"
            row: TableRow = {"case": case.title, "note": f"not measured: {needed} of the part's {part.budget_s:.0f} s"}
        else:
            if shows:
                print(f"measuring {name}: {case.title} ...", file=sys.stderr, flush=True)
            row = measure_case(report, name, case)
            longest_s = max(longest_s, time.perf_counter() - start_s - spent_s)
        rows.append(row)
        report.add(name, row, time.perf_counter() - start_s)
    if shows:
        columns: Columns = {"case": (name, ""), **part.columns, "note": ("note", "")}
        used = {key: each for key, each in columns.items() if any(row.get(key) is not None for row in rows)}
        print(f"{format_table(used, rows)}\n", flush=True)


def run(options: argparse.Namespace) -> BenchmarkResult:
    """Measures the parts that `--only` names, or all."""
    options.json = options.json or DEFAULT_FILE
    if options.prints:
        outputs.check_writable(options.json)
    devices, start_s = all_devices(), time.perf_counter()
    setting = Setting(
        platform=devices[0].platform,
        rounds=options.pairs,
        overrides=tuple(options.overrides),
        folder=options.folder,
    )
    environment = accelerator_environment.describe()
    report = Report(options.json if options.prints else None, environment)
    for name in PARTS:
        if options.only is None or name in options.only:
            measure_part(report, name, setting, options.prints)
    rows = [row for part in report.parts.values() for row in part["rows"]]
    unmeasured = sum(row["note"] is not None for row in rows)
    minutes = (time.perf_counter() - start_s) / 60
    text = f"{len(rows) - unmeasured} of {len(rows)} cases measured in {minutes:.1f} minutes"
    text += f", {len(report.failures)} failed; all is in {options.json}: send this file back"
    small = "; tiny sizes, since a CPU emulates the devices: no speed of an accelerator" if setting.is_small else ""
    return BenchmarkResult(
        text=text,
        note=f"Medians of up to {setting.rounds} rounds{small}",
        measurements=report.measurements(),
        environment={name: environment[name] for name in ("device", "devices", "processes", "jax", "date", "commit")},
    )
