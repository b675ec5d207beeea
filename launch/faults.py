"""`python -m launch faults`: injects the fault matrix into real runs on this machine, and prints what happened."""

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from jaxinfra.cli.markdown import insert_table
from jaxinfra.errors import ConfigError, JaxinfraError
from jaxinfra.storage import outputs
from tests.faults.harness import Harness
from tests.faults.matrix import Outcome, Row, all_rows, markdown_table, run_rows


class MatrixError(JaxinfraError):
    """A run did not survive a fault."""


def run(options: argparse.Namespace) -> None:
    """Prints each row when it is done; raises MatrixError if a run did not survive one."""
    rows = _chosen(options.only)
    if options.write is not None and options.only is not None:
        raise ConfigError(f"--only {options.only} --write {options.write}: a page has all rows; leave out one of them")
    if options.write is not None:
        outputs.check_writable(options.write)
        insert_table(options.write, "faults", "")
    kept = nullcontext(options.keep) if options.keep else tempfile.TemporaryDirectory(prefix="jaxinfra-faults-")
    outcomes: list[Outcome] = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that disks are unmounted
    with kept as folder:
        _require_empty(Path(folder))
        seed = int(time.time()) if options.seed is None else options.seed
        harness = Harness(Path(folder), is_long=options.long, soak_events=options.soak or 0, seed=seed)
        print(f"injecting {', '.join(each.label for each in rows)}; a row takes about a minute", file=sys.stderr)
        for outcome in run_rows(harness, rows):
            outcomes.append(outcome)
            print(_line(outcome), flush=True)
    failed = [each for each in outcomes if each.verdict == "failed"]
    counts = {verdict: _count(outcomes, verdict) for verdict in ("survived", "not tried", "failed")}
    counted = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    seconds = sum(each.seconds for each in outcomes)
    print(f"{sum(counts.values())} rows: {counted}; {seconds:.0f} s, seed {seed}", file=sys.stderr)
    if options.write is not None and not failed:
        outputs.write_text(options.write, insert_table(options.write, "faults", markdown_table(outcomes)))
    if failed:
        first = failed[0]
        again = f"--only {first.row.numbers[0]}{' --long' * options.long} --seed {seed} --keep DIR"
        raise MatrixError(f"row {first.row.label}: {first.text}; run it alone by {again}")


def _count(outcomes: Sequence[Outcome], verdict: str) -> int:
    return sum(len(each.row.numbers) for each in outcomes if each.verdict == verdict)


def _chosen(only: str | None) -> list[Row]:
    """Returns the rows with these numbers, such as 19,20; all by default."""
    rows = all_rows()
    if only is None:
        return rows
    known = {number for row in rows for number in row.numbers}
    words = only.split(",")
    if unknown := [word for word in words if not word.isdecimal() or int(word) not in known]:
        raise ConfigError(f"--only {only}: no row {unknown[0]}; the rows are 1 to {max(known)}, use --only 19,20")
    return [row for row in rows if {*row.numbers} & {int(word) for word in words}]


def _require_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or os.listdir(folder)):
        raise ConfigError(f"--keep {folder}: is not empty; name a new folder")


def _line(outcome: Outcome) -> str:
    verdict = {"failed": "FAILED"}.get(outcome.verdict, outcome.verdict)
    return f"{outcome.row.label:>5}  {verdict:<9}  {outcome.seconds:5.1f} s  {outcome.row.fault}: {outcome.text[:2000]}"
