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
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from jaxinfra.storage.atomic import replace_bytes
from jaxinfra.storage.errors import storage_errors
from jaxinfra.track import jsonl
from jaxinfra.track.charts import Chart, Point, Series, figure
from jaxinfra.track.text import flatten, number, summary_rows, words

RUN = "run.json"
REPORT = "report.html"

_OWN_SECTIONS = ("command", "config", "origins", "derived")
_NOT_CHARTED = ("step", "time_s")
_KNOWN = (
    "loss",
    "lr",
    "grad_norm",
    "mfu",
    "step_time_s",
    "data_wait_s",
    "rss_bytes",
)
_DEVICE_LINES = 3  # beside the one of the host: a chart has four colours
_OTHER_CHARTS = 24  # further metrics than these are named below the charts, not drawn
type _Points = Mapping[str, Sequence[Point]]  # by name of the metric

_SIZES = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes"))


def write_report(run_dir: Path) -> Path:
    """Writes report.html into `run_dir` in one atomic replacement, and returns its path.

    Raises:
        StorageError: run.json is missing, a file is damaged, or the page cannot be written.
    """
    record = jsonl.read_json(run_dir / RUN)
    summary_file, metrics_file = run_dir / jsonl.SUMMARY, run_dir / jsonl.METRICS
    summary = jsonl.read_json(summary_file) if summary_file.exists() else {}
    rows = jsonl.read(metrics_file) if metrics_file.exists() else []
    path = run_dir / REPORT
    with storage_errors(path):
        replace_bytes(path, page(record, rows, summary).encode())
    return path


def page(record: Mapping[str, Any], rows: Sequence[Mapping[str, float]], summary: Mapping[str, Any]) -> str:
    """Returns the whole page; see the module for what `record`, `rows` and `summary` hold."""
    style, script = (_asset(name) for name in ("report.css", "report.js"))
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{script_hash}'"
    name = _name(record)
    body = "\n".join(
        [
            _header(name, record.get("command", ()), summary.get("status")),
            _tiles(summary),
            _baselines(summary),
            _charts(rows),
            _derived(record.get("derived", {})),
            _config(record.get("config", {}), record.get("origins", {})),
            _environment({key: value for key, value in record.items() if key not in _OWN_SECTIONS}),
        ]
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(name)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n{body}\n"
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def _asset(name: str) -> str:
    return (resources.files("jaxinfra.track") / "assets" / name).read_text(encoding="utf-8")


def _name(record: Mapping[str, Any]) -> str:
    config = record.get("config", {})
    return str(config.get("name", "run"))


def _header(name: str, command: Sequence[str], status: str | None) -> str:
    """Names the run, says how it ended if it has, and how it was started."""
    kind = status if status in ("finished", "stopped") else "open"
    shown = escape(status or "not finished")
    return (
        f'<header><h1>{escape(name)}</h1><span class="status {kind}">{shown}</span>'
        f"<p><code>{escape(shlex.join(command))}</code></p></header>"
    )


def _tiles(summary: Mapping[str, Any]) -> str:
    shown = {key: value for key, value in summary.items() if key not in ("status", "baselines")}
    tiles: list[str] = []
    for label, value in summary_rows(shown):
        long = ' class="long"' if len(value) > 24 else ""
        tiles.append(f"<div{long}><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>")
    return f'<dl class="tiles">{"".join(tiles)}</dl>' if tiles else ""


def _baselines(summary: Mapping[str, Any]) -> str:
    """Compares each held-out score that has baselines with them, the lowest first."""
    scores, baselines = summary.get("heldout") or {}, summary.get("baselines") or {}
    return "".join(_comparison(name, own, baselines[name]) for name, own in scores.items() if baselines.get(name))


def _comparison(score: str, own: float, baselines: Mapping[str, float]) -> str:
    values = [(name, value) for name, value in [("this run", own), *baselines.items()] if math.isfinite(value)]
    values.sort(key=lambda item: item[1])
    longest = max((value for _, value in values), default=0.0) or 1.0
    rows = [
        f"<tr{' class=own' if name == 'this run' else ''}><td>{escape(name)}</td><td>{value:.4f}</td>"
        f'<td class="bar"><i style="width:{100 * value / longest:.1f}%"></i></td></tr>'
        for name, value in values
    ]
    return _section(f"Held-out {words(score)}, beside others", f"<table>{''.join(rows)}</table>")


def _charts(rows: Sequence[Mapping[str, float]]) -> str:
    points: dict[str, list[Point]] = {}
    for row in rows:
        for key, value in row.items():
            points.setdefault(key, []).append((int(row["step"]), value))
    scored = _scored(points)
    known = _known_charts(points)
    used = {*_NOT_CHARTED, *_KNOWN, *_device_keys(points), *_speeds(points), *scored, *scored.values()}
    others = sorted(key for key in points if key not in used)
    charts = known + [Chart(title=key, series=_series({key: key}, points)) for key in others[:_OTHER_CHARTS]]
    steps = [int(row["step"]) for row in rows] or [0]
    figures = "".join(figure(chart, (min(steps), max(steps))) for chart in charts)
    left_out = ", ".join(map(escape, others[_OTHER_CHARTS:]))
    note = f'<p class="empty">Logged, but not drawn: {left_out}</p>' if left_out else ""
    return _section("Over steps", f'<div class="charts">{figures}</div>{note}<p id="at"></p>')


def _known_charts(points: _Points) -> list[Chart]:
    """Returns the charts that every run has, whether or not it logged their values."""
    memory_keys = {"rss_bytes": "host"} | {key: _device_label(key) for key in _device_keys(points)}
    memory = _series(memory_keys, points)
    largest = max((value for s in memory for _, value in s.points if math.isfinite(value)), default=1.0)
    divisor, unit = next((d, u) for d, u in _SIZES if largest >= d or d == 1)
    loss = _series({"loss": "training", "eval/loss": "held-out"}, points)
    scores = [
        Chart(title=words(trained).capitalize(), series=_series({trained: "training", name: "held-out"}, points))
        for name, trained in _scored(points).items()
        if trained != "loss"
    ]
    speeds = {name: words(name) for name in _speeds(points)}
    return [
        Chart(title="Loss", unit="nats", series=loss, scale="auto"),
        *scores,
        Chart(title="Learning rate", series=_series({"lr": "lr"}, points), zero=True),
        Chart(title="Gradient norm", series=_series({"grad_norm": "norm"}, points), scale="auto", zero=True),
        Chart(title="Throughput", unit=", ".join(speeds.values()), series=_series(speeds, points), zero=True),
        Chart(title="MFU", unit="%", series=_series({"mfu": "MFU"}, points), zero=True, divisor=0.01),
        Chart(
            title="Time of a step",
            unit="s",
            series=_series({"step_time_s": "step", "data_wait_s": "waiting for data"}, points),
            scale="auto",
            zero=True,
        ),
        Chart(title="Memory", unit=unit, series=memory, zero=True, divisor=divisor),
    ]


def _series(labels: Mapping[str, str], points: _Points) -> tuple[Series, ...]:
    return tuple(Series(label=label, points=points[key]) for key, label in labels.items() if key in points)


def _scored(points: _Points) -> dict[str, str]:
    """Returns the scores of evaluations, and the name that each has in training."""
    return {key: key.removeprefix("eval/") for key in points if key.startswith("eval/")}


def _speeds(points: _Points) -> list[str]:
    return [key for key in points if key.endswith("_per_s")]


def _device_keys(points: _Points) -> list[str]:
    keys = sorted(key for key in points if key.startswith("device_") and key.endswith("_bytes"))
    return keys[:_DEVICE_LINES]


def _device_label(key: str) -> str:
    return key.removesuffix("_bytes").replace("_", " ")


def _derived(derived: Mapping[str, Sequence[Any]]) -> str:
    rows = [(name, number(value), str(how)) for name, (value, how) in derived.items()]
    return _section("Derived numbers", _table(("number", "value", "unit or how"), rows)) if rows else ""


def _config(config: Mapping[str, Any], origins: Mapping[str, Any]) -> str:
    """Lists the changed leaves with their origins, and folds away the whole config."""
    leaves = flatten(config)
    changed = [(path, _leaf(leaves.get(path)), str(origin)) for path, origin in origins.items()]
    everything = _table(("field", "value"), [(path, _leaf(value)) for path, value in leaves.items()])
    shown = _table(("field", "value", "set by"), changed) if changed else '<p class="empty">All defaults.</p>'
    folded = f"<details><summary>All {len(leaves)} fields</summary>{everything}</details>"
    return _section("Config, changed from the defaults", shown + folded) if leaves else ""


def _leaf(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _environment(facts: Mapping[str, Any]) -> str:
    leaves = flatten(facts)
    rows = [(key, value if isinstance(value, str) else _leaf(value)) for key, value in leaves.items()]
    return _section("Environment", _table((), rows)) if rows else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Makes a table of plain strings; the third column, where there is one, is set back as an explanation."""
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in head)] if head else []
    for row in rows:
        cells = [f"<td{' class=how' if i == 2 else ''}>{escape(cell)}</td>" for i, cell in enumerate(row)]
        lines.append("".join(cells))
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"
