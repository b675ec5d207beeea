"""Writes report.html, one page about a run, from the files in its directory.

The page needs no network and no server. Its only script shows values at the pointer; the content security policy allows
only this script, by its hash. The page can be written during a run, after a kill, or on another machine, from:
    run.json: `command`; `config`, nested by field; `origins`, the source of each changed field; `derived`, the run
        statistics as [value, unit or formula]; everything else is listed as the environment.
    metrics.jsonl, optional: see `jsonl`; "device_*_bytes" is device memory.
    summary.json, optional: see `formatting.summary_rows`.
"""

import base64
import hashlib
import json
import math
import shlex
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from jaxinfra.storage.atomic import write_bytes_atomic
from jaxinfra.storage.errors import storage_errors
from jaxinfra.track import jsonl
from jaxinfra.track.charts import Chart, Point, render_chart
from jaxinfra.track.formatting import bytes_unit, flatten, format_number, metric_label, summary_rows

_OWN_SECTIONS = ("command", "config", "origins", "derived")
_NOT_CHARTED = ("step", "time_s")
_FIXED_CHARTS = ("loss", "lr", "grad_norm", "mfu", "step_time_s", "data_wait_s", "rss_bytes")
_MAX_DEVICE_LINES = 3  # a chart has four colors, and one is the host's
_MAX_OTHER_CHARTS = 24  # more metrics than these are only named below the charts

type _Points = Mapping[str, Sequence[Point]]  # by name of the metric
type _Labels = Mapping[str, str]  # by name of the metric


def write_report(run_dir: Path) -> Path:
    """Writes report.html into `run_dir` atomically and returns its path.

    Raises StorageError if run.json is missing, a file is damaged, or the page cannot be written.
    """
    record = jsonl.read_json_object(run_dir / "run.json")
    summary_file, metrics_file = run_dir / jsonl.SUMMARY_FILE, run_dir / jsonl.METRICS_FILE
    summary = jsonl.read_json_object(summary_file) if summary_file.exists() else {}
    rows = jsonl.read_metrics(metrics_file) if metrics_file.exists() else []
    path = run_dir / "report.html"
    with storage_errors(path):
        write_bytes_atomic(path, render_report(record, rows, summary).encode())
    return path


def render_report(record: Mapping[str, Any], rows: Sequence[Mapping[str, float]], summary: Mapping[str, Any]) -> str:
    """Renders the page from the contents of run.json, metrics.jsonl and summary.json."""
    loader = PackageLoader("jaxinfra.track", "assets")
    environment = Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    style, script = (loader.get_source(environment, name)[0] for name in ("report.css", "report.js"))
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    config = flatten(record.get("config", {}))
    other = flatten({key: value for key, value in record.items() if key not in _OWN_SECTIONS})
    figures, not_drawn = _charts(rows)
    return environment.get_template("report.html.jinja").render(
        style=style,
        script=script,
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{script_hash}'",
        name=str(record.get("config", {}).get("name", "run")),
        command=shlex.join(record.get("command", ())),
        status=summary.get("status"),
        tiles=summary_rows({key: value for key, value in summary.items() if key not in ("status", "baselines")}),
        comparisons=list(_comparisons(summary)),
        figures=figures,
        not_drawn=not_drawn,
        derived=[(name, format_number(value), str(how)) for name, (value, how) in record.get("derived", {}).items()],
        config=[(path, _to_json(value)) for path, value in config.items()],
        changed=[(path, _to_json(config.get(path)), str(set_by)) for path, set_by in record.get("origins", {}).items()],
        environment=[(key, value if isinstance(value, str) else _to_json(value)) for key, value in other.items()],
    )


def _to_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _comparisons(summary: Mapping[str, Any]) -> Iterator[tuple[str, list[tuple[str, float, float]]]]:
    """Yields each validation metric with baselines: label, then (name, value, percentage of the largest), ascending."""
    for metric, own in (summary.get("validation") or {}).items():
        if others := (summary.get("baselines") or {}).get(metric):
            values = [each for each in [("this run", own), *others.items()] if math.isfinite(each[1])]
            largest = max((value for _, value in values), default=0.0) or 1.0
            values.sort(key=lambda each: each[1])
            yield metric_label(metric), [(name, value, 100 * value / largest) for name, value in values]


def _charts(rows: Sequence[Mapping[str, float]]) -> tuple[str, list[str]]:
    """Draws the metrics as HTML figures; also returns the names of metrics beyond `_MAX_OTHER_CHARTS`."""
    points: defaultdict[str, list[Point]] = defaultdict(list)
    for row in rows:
        for key, value in row.items():
            points[key].append((int(row["step"]), value))
    evaluation = {key: key.removeprefix("eval/") for key in points if key.startswith("eval/")}
    speeds = {key: metric_label(key) for key in points if key.endswith("_per_s")}
    devices = sorted(key for key in points if key.startswith("device_") and key.endswith("_bytes"))[:_MAX_DEVICE_LINES]
    memory = {"rss_bytes": "host"} | {key: key.removesuffix("_bytes").replace("_", " ") for key in devices}
    used = {*_NOT_CHARTED, *_FIXED_CHARTS, *memory, *speeds, *evaluation, *evaluation.values()}
    others = sorted(key for key in points if key not in used)
    charts = _fixed_charts(points, evaluation, speeds, memory)
    charts += [Chart(title=key, lines={key: points[key]}) for key in others[:_MAX_OTHER_CHARTS]]
    steps = [int(row["step"]) for row in rows] or [0]
    return "".join(render_chart(chart, (min(steps), max(steps))) for chart in charts), others[_MAX_OTHER_CHARTS:]


def _fixed_charts(points: _Points, evaluation: _Labels, speeds: _Labels, memory: _Labels) -> list[Chart]:
    """Returns the charts that every run has, even if it logged no values for them.

    `evaluation` maps "eval/NAME" to "NAME", the training metric; `speeds` and `memory` map metrics to labels.
    """
    sizes = _lines(memory, points)
    largest = max((value for line in sizes.values() for _, value in line if math.isfinite(value)), default=1.0)
    divisor, unit = bytes_unit(largest)
    evaluation_charts = [
        Chart(title=metric_label(name).capitalize(), lines=_lines({name: "training", key: "validation"}, points))
        for key, name in evaluation.items()
        if name != "loss"
    ]
    loss = _lines({"loss": "training", "eval/loss": "validation"}, points)
    times = _lines({"step_time_s": "step", "data_wait_s": "waiting for data"}, points)
    return [
        Chart(title="Loss", unit="nats", lines=loss, scale="auto"),
        *evaluation_charts,
        Chart(title="Learning rate", lines=_lines({"lr": "lr"}, points), zero=True),
        Chart(title="Gradient norm", lines=_lines({"grad_norm": "norm"}, points), scale="auto", zero=True),
        Chart(title="Throughput", unit=", ".join(speeds.values()), lines=_lines(speeds, points), zero=True),
        Chart(title="MFU", unit="%", lines=_lines({"mfu": "MFU"}, points), zero=True, divisor=0.01),
        Chart(title="Step time", unit="s", lines=times, scale="auto", zero=True),
        Chart(title="Memory", unit=unit, lines=sizes, zero=True, divisor=divisor),
    ]


def _lines(labels: _Labels, points: _Points) -> _Points:
    return {label: points[key] for key, label in labels.items() if key in points}
