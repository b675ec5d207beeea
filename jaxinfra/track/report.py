"""Writes the page of a run, report.html, or a page that compares several, from the files in their directories.

A page needs no network and no server; the content security policy allows only its own scripts, by their hashes. It can
be written during a run, after a kill, or on another machine, from:
    run.json: `command`; `config`, nested by field; `origins`, the source of each changed field; `derived`, the run
        statistics as [value, unit or formula]; `devices` and `host`; everything else is listed as the environment.
    metrics.jsonl, samples.jsonl and summary.json (see `jsonl`) and goodput.jsonl, where they are there.
"""

import base64
import hashlib
import json
import math
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from jaxinfra.config.text import format_value
from jaxinfra.config.view import config_leaves
from jaxinfra.storage.atomic import write_bytes_atomic
from jaxinfra.storage.errors import storage_errors
from jaxinfra.track import jsonl
from jaxinfra.track.charts import make_charts, page_data, run_curves
from jaxinfra.track.formatting import (
    flatten,
    format_bytes,
    format_metric,
    format_number,
    format_short,
    metric_label,
    shown_metrics,
    summary_rows,
)
from jaxinfra.track.goodput import GOODPUT_FILE, Attempt, account, read_ledger
from jaxinfra.track.runs import no_run_error
from jaxinfra.track.timeline import COLUMNS, HEIGHT, timeline

REPORT_FILE = "report.html"
EVERY_S = 15.0
"""Seconds between two pages of a run that goes on, and after which such a page loads itself again."""
MAX_RUNS = 8
"""Runs of a comparison: a chart has as many colors."""

_OWN_SECTIONS = ("command", "config", "origins", "derived", "devices", "host", "peak", "baselines", "classes")
_OF_CHECKPOINTS = ("guard", "interval", "evaluated")  # parts of a record that was lost, and written again from one
_MAX_AGE_S = 3600.0  # of a page that loads itself again: the run may have been killed
_SAMPLES = "Samples at evaluations"
_SHOWN_SAMPLES, _MAX_OLDER_SAMPLES = 3, 100
_ASSETS = ("report.css", "uPlot.min.css", "uPlot.LICENSE", "uPlot.iife.min.js", "report.js")


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """The contents of a run's files; `state` is "running", "interrupted", or the status in the summary."""

    name: str
    state: str
    record: Mapping[str, Any]
    summary: Mapping[str, Any]
    rows: Sequence[Mapping[str, float]]
    samples: Sequence[tuple[int, str]]
    attempts: Sequence[Attempt] = ()


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table of the page; the rows in `folded` are shown on demand, under `folded_title`."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    folded: Sequence[Sequence[str]] = ()
    folded_title: str = ""


def write_report(run_dir: Path, *, is_running: bool = False, check: Callable[[], None] = lambda: None) -> Path:
    """Writes report.html into `run_dir` atomically, after `check`, and returns its path.

    Raises ConfigError without a run.json, StorageError if a file is damaged or the page cannot be written.
    """
    path, run = run_dir / REPORT_FILE, read_run(run_dir, is_running=is_running)
    with storage_errors(path):
        page = render_report([run]).encode()  # takes seconds for a long run
        check()
        write_bytes_atomic(path, page)
    return path


def read_run(run_dir: Path, *, is_running: bool) -> RunFiles:
    """Reads the files of a run; raises ConfigError without a run.json, StorageError if a file is damaged."""
    record_file, summary_file, metrics_file, samples_file = (
        run_dir / name for name in ("run.json", jsonl.SUMMARY_FILE, jsonl.METRICS_FILE, jsonl.SAMPLES_FILE)
    )
    if not record_file.exists():
        raise no_run_error(run_dir)
    record = jsonl.read_json_object(record_file)
    rows = jsonl.read_metrics(metrics_file) if metrics_file.exists() else []
    # The summary of a run that goes on is that of its last stop.
    summary = jsonl.read_summary(summary_file) if summary_file.exists() and not is_running else {}
    return RunFiles(
        name=str(record.get("config", {}).get("name", run_dir.name)),
        state="running" if is_running else str(summary.get("status", "interrupted")),
        record=record,
        summary=_last_values(rows) | {"baselines": record.get("baselines")} | summary,
        rows=rows,
        samples=jsonl.read_samples(samples_file) if samples_file.exists() else [],
        attempts=read_ledger(run_dir / GOODPUT_FILE),
    )


def _last_values(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Returns what a summary would say now, of a run that goes on or was killed."""
    last: dict[str, float] = {}
    for row in rows:
        last.update(shown_metrics(row))
    if not last:
        return {}
    validation = {name.removeprefix("eval/"): value for name, value in last.items() if name.startswith("eval/")}
    steps, loss = int(last["step"]), last.get("loss")
    return {"steps": steps, "wall_s": last.get("time_s"), "final_loss": loss, "validation": validation}


def render_report(runs: Sequence[RunFiles]) -> str:
    """Renders the page as HTML."""
    loader = PackageLoader("jaxinfra.track", "assets")
    environment = Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    style, uplot_style, uplot_license, *scripts = (loader.get_source(environment, name)[0] for name in _ASSETS)
    digests = (hashlib.sha256(script.encode()).digest() for script in scripts)
    hashes = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    curves = [run_curves(run.name, run.rows, run.record, run.summary) for run in runs]
    charts = make_charts(curves)
    only, names = runs[0] if len(runs) == 1 else None, [run.name for run in runs]
    results = [{"State": run.state, **dict(_tiles(run))} for run in runs]
    reload = {"everyMs": 1e3 * EVERY_S, "untilMs": 1e3 * (time.time() + _MAX_AGE_S)}
    data = page_data(curves, charts.drawn) | {"reload": reload if only and only.state == "running" else None}
    return environment.get_template("report.html.jinja").render(
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src {hashes}",
        style=uplot_style + style,
        license=uplot_license,
        scripts=scripts,
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        title=", ".join(names),
        runs=[
            {
                "name": run.name,
                "state": run.state,
                "command": shlex.join(map(str, run.record.get("command", ()))),
                "error": run.summary.get("error"),
            }
            for run in runs
        ],
        charts=charts.drawn,
        axes=["steps", *({run.units for run in curves} if all(run.units_per_step for run in curves) else ()), "time"],
        omitted=charts.omitted,
        timelines=[(run.name, timeline(account(run.attempts))) for run in runs if run.attempts],
        timeline_size=(COLUMNS, HEIGHT),
        tiles=_tiles(only) if only else [],
        comparisons=list(_comparisons(only.summary)) if only else [],
        results=[] if only else [Table(title="Results", head=("", *names), rows=_by_key(results))],
        tables=[
            Table(title="Constant at all logged steps", head=("metric", "value"), rows=charts.constant),
            *(_own_tables(only) if only else _difference_tables(runs)),
        ],
    )


def _tiles(run: RunFiles) -> list[tuple[str, str]]:
    left_out = ("status", "error", "baselines", "report", "peak_flops_per_device", "peak_source")
    return summary_rows({key: value for key, value in run.summary.items() if key not in left_out})


def _comparisons(summary: Mapping[str, Any]) -> Iterator[tuple[str, list[tuple[str, str, float]]]]:
    """Yields each validation metric with baselines: label, then (name, value, percentage of the largest), ascending."""
    for metric, own in (summary.get("validation") or {}).items():
        if others := (summary.get("baselines") or {}).get(metric):
            values = [each for each in [("this run", own), *others.items()] if math.isfinite(each[1])]
            largest = max((value for _, value in values), default=0.0) or 1.0
            values.sort(key=lambda each: each[1])
            yield metric_label(metric), [(name, format_metric(each), 100 * each / largest) for name, each in values]


def _own_tables(run: RunFiles) -> Iterator[Table]:
    record = run.record
    samples = [(f"step {step:,}", text) for step, text in reversed(run.samples)]
    older = samples[_SHOWN_SAMPLES:][:_MAX_OLDER_SAMPLES]
    title = f"{len(older)} older samples"
    yield Table(title=_SAMPLES, head=(), rows=samples[:_SHOWN_SAMPLES], folded=older, folded_title=title)
    yield Table(title="Hardware", head=(), rows=[*_texts(_hardware(run)).items()])
    derived = [(name, value, how) for name, (value, how) in _statistics(record).items()]
    yield Table(title="Run statistics", head=("statistic", "value", "unit or formula"), rows=derived)
    config = config_leaves(record.get("config", {}))
    origins = record.get("origins", {}).items()
    changed = [(path, config[path], str(origin)) for path, origin in origins if path in config]
    yield Table(
        title="Config, changed from the defaults",
        head=("field", "value", "set by"),
        rows=changed,
        note="" if changed or not config else "All fields have their defaults.",
        folded=[*config.items()],
        folded_title=f"All {len(config)} fields",
    )
    yield Table(title="Environment", head=(), rows=[*_texts(_environment(record)).items()])


def _difference_tables(runs: Sequence[RunFiles]) -> Iterator[Table]:
    """Yields the tables of a comparison: newest samples, and what differs between the runs."""
    names = [run.name for run in runs]
    samples = [(f"{run.name}, step {step:,}", text) for run in runs for step, text in run.samples[-1:]]
    yield Table(title=_SAMPLES, head=(), rows=samples)
    configs = [config_leaves({**run.record.get("config", {}), "name": None}) for run in runs]
    statistics = [{name: value for name, (value, _) in _statistics(run.record).items()} for run in runs]
    environments = [_texts(_hardware(run) | _environment(run.record)) for run in runs]
    for title, columns in (("Config", configs), ("Run statistics", statistics), ("Environment", environments)):
        rows = _by_key(columns)
        different = [row for row in rows if len({*row[1:]}) > 1]
        note = f"{len(rows) - len(different)} of {len(rows)} are equal." if rows else ""
        yield Table(title=f"{title}, differences", head=("", *names), rows=different, note=note)


def _by_key(columns: Sequence[Mapping[str, str]]) -> list[tuple[str, ...]]:
    """Returns a row for each key of any column; a column without it has a dash."""
    keys = dict.fromkeys(key for column in columns for key in column)
    return [(key, *(column.get(key, "-") for column in columns)) for key in keys]


def _statistics(record: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    return {name: (format_number(value), str(how)) for name, (value, how) in (record.get("derived") or {}).items()}


def _hardware(run: RunFiles) -> dict[str, Any]:
    leaves = flatten({key: run.record[key] for key in ("devices", "host") if key in run.record})
    # An axis of size 1 is not used.
    leaves = {key: value for key, value in leaves.items() if not (key.startswith("devices.mesh.") and value == 1)}
    if isinstance(peak := run.summary.get("peak_flops_per_device"), float):
        short = format_short(peak).replace("B", "G")  # the prefix of units
        leaves["peak of a device"] = f"{short}FLOP/s, {run.summary.get('peak_source')}"
    return leaves


def _environment(record: Mapping[str, Any]) -> dict[str, Any]:
    return flatten({key: value for key, value in record.items() if key not in _OWN_SECTIONS + _OF_CHECKPOINTS})


def _texts(leaves: Mapping[str, Any]) -> dict[str, str]:
    return {
        key: format_bytes(value) if key.endswith("_bytes") and isinstance(value, int | float) else _text(value)
        for key, value in leaves.items()
    }


def _text(value: object) -> str:
    if isinstance(value, list | tuple | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return format_value(value) if value is None or isinstance(value, bool) else format_number(value)
