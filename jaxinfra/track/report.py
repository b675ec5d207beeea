"""report.html: one page that tells a run, from the files in its directory alone.

The page needs no network, no server and no script: charts are drawn into it, and the one small script, which
only shows values under the pointer, is named to the browser by its hash so that no other may run. It can be
written while a run goes on, after a kill, or on another machine.

What is read, everything but run.json optional:
    run.json: `command`, a list of words; `config`, nested by field, in which `name` names the run; `origins`,
        which maps the path of each changed leaf to where its value came from; `derived`, which maps names to
        [value, unit or how]. All else is the environment and is listed as it is.
    metrics.jsonl: see `jsonl`; a value that begins with "device_" and ends with "_bytes" is device memory.
    summary.json: see `text.summary_rows`.
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
_KNOWN = ("loss", "lr", "grad_norm", "mfu", "step_time_s", "data_wait_s", "rss_bytes")
_DEVICE_LINES = 3  # beside the one of the host: a chart has four colours
_OTHER_CHARTS = 24  # further metrics than these are named below the charts, not drawn

type _Points = Mapping[str, Sequence[Point]]  # by name of the metric
type _Labels = Mapping[str, str]  # likewise


def write_report(run_dir: Path) -> Path:
    """Writes report.html into `run_dir` in one atomic replacement, and returns its path.

    StorageError where run.json is missing, a file is damaged, or the page cannot be written.
    """
    record = jsonl.read_json(run_dir / "run.json")
    summary_file, metrics_file = run_dir / jsonl.SUMMARY, run_dir / jsonl.METRICS
    summary = jsonl.read_json(summary_file) if summary_file.exists() else {}
    rows = jsonl.read_metrics(metrics_file) if metrics_file.exists() else []
    path = run_dir / "report.html"
    with storage_errors(path):
        write_bytes_atomic(path, render_report(record, rows, summary).encode())
    return path


def render_report(record: Mapping[str, Any], rows: Sequence[Mapping[str, float]], summary: Mapping[str, Any]) -> str:
    """Returns the whole page; see the module for what `record`, `rows` and `summary` hold."""
    loader = PackageLoader("jaxinfra.track", "assets")
    environment = Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    style, script = (loader.get_source(environment, name)[0] for name in ("report.css", "report.js"))
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    config = flatten(record.get("config", {}))
    facts = flatten({key: value for key, value in record.items() if key not in _OWN_SECTIONS})
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
        config=[(path, _leaf(value)) for path, value in config.items()],
        changed=[(path, _leaf(config.get(path)), str(set_by)) for path, set_by in record.get("origins", {}).items()],
        environment=[(key, value if isinstance(value, str) else _leaf(value)) for key, value in facts.items()],
    )


def _leaf(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _comparisons(summary: Mapping[str, Any]) -> Iterator[tuple[str, list[tuple[str, float, float]]]]:
    """Yields each validation score that has baselines: its own value and theirs, the lowest first, and percentages."""
    for score, own in (summary.get("validation") or {}).items():
        if others := (summary.get("baselines") or {}).get(score):
            values = [each for each in [("this run", own), *others.items()] if math.isfinite(each[1])]
            longest = max((value for _, value in values), default=0.0) or 1.0
            values.sort(key=lambda each: each[1])
            yield metric_label(score), [(name, value, 100 * value / longest) for name, value in values]


def _charts(rows: Sequence[Mapping[str, float]]) -> tuple[str, list[str]]:
    """Draws the metrics as HTML figures, and returns the names of those that are too many to draw, too."""
    points: defaultdict[str, list[Point]] = defaultdict(list)
    for row in rows:
        for key, value in row.items():
            points[key].append((int(row["step"]), value))
    scored = {key: key.removeprefix("eval/") for key in points if key.startswith("eval/")}
    speeds = {key: metric_label(key) for key in points if key.endswith("_per_s")}
    devices = sorted(key for key in points if key.startswith("device_") and key.endswith("_bytes"))[:_DEVICE_LINES]
    memory = {"rss_bytes": "host"} | {key: key.removesuffix("_bytes").replace("_", " ") for key in devices}
    used = {*_NOT_CHARTED, *_KNOWN, *memory, *speeds, *scored, *scored.values()}
    others = sorted(key for key in points if key not in used)
    charts = _known_charts(points, scored, speeds, memory)
    charts += [Chart(title=key, lines={key: points[key]}) for key in others[:_OTHER_CHARTS]]
    steps = [int(row["step"]) for row in rows] or [0]
    return "".join(render_chart(chart, (min(steps), max(steps))) for chart in charts), others[_OTHER_CHARTS:]


def _known_charts(points: _Points, scored: _Labels, speeds: _Labels, memory: _Labels) -> list[Chart]:
    """Returns the charts that every run has, whether or not it logged their values.

    `scored` maps the scores of evaluations to their names in training; `speeds` and `memory`, in bytes, have labels.
    """
    sizes = _lines(memory, points)
    largest = max((value for line in sizes.values() for _, value in line if math.isfinite(value)), default=1.0)
    divisor, unit = bytes_unit(largest)
    scores = [
        Chart(title=metric_label(trained).capitalize(), lines=_lines({trained: "training", name: "validation"}, points))
        for name, trained in scored.items()
        if trained != "loss"
    ]
    loss = _lines({"loss": "training", "eval/loss": "validation"}, points)
    times = _lines({"step_time_s": "step", "data_wait_s": "waiting for data"}, points)
    return [
        Chart(title="Loss", unit="nats", lines=loss, scale="auto"),
        *scores,
        Chart(title="Learning rate", lines=_lines({"lr": "lr"}, points), zero=True),
        Chart(title="Gradient norm", lines=_lines({"grad_norm": "norm"}, points), scale="auto", zero=True),
        Chart(title="Throughput", unit=", ".join(speeds.values()), lines=_lines(speeds, points), zero=True),
        Chart(title="MFU", unit="%", lines=_lines({"mfu": "MFU"}, points), zero=True, divisor=0.01),
        Chart(title="Time of a step", unit="s", lines=times, scale="auto", zero=True),
        Chart(title="Memory", unit=unit, lines=sizes, zero=True, divisor=divisor),
    ]


def _lines(labels: _Labels, points: _Points) -> _Points:
    return {label: points[key] for key, label in labels.items() if key in points}
