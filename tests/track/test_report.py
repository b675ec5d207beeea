import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser

import pytest

from jaxinfra.config.view import config_leaves
from jaxinfra.errors import ConfigError, StorageError
from jaxinfra.track.config import TrackConfig
from jaxinfra.track.report import read_run, render_report, write_report
from jaxinfra.track.tracker import make_trackers
from tests.refusals import raises

EVIL = "</td></script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&"
VOID = {"meta", "link", "br", "img", "input", "hr"}
# Every metric has the same values, except one that never changes.
METRICS = ("loss", "grad_norm", "lr", "tokens_per_s", "step_time_s", "mfu", "data_wait_s", "rss_bytes", "device_bytes")


class Page(HTMLParser):
    """Checks that every tag is closed in order, and keeps what a test asks for."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], {}
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)


def record(**changes):
    return {
        "format": 1,
        "command": ["python", "-m", "launch", "train", "configs/tiny.py", "train.steps=100"],
        "config": {"name": "tiny", "train": {"steps": 100, "lr": 3e-4}},
        "origins": {"train.steps": "command line"},
        "derived": {"parameters": [1_000_000, "count"], "tokens a step": [4096, ""]},
        "versions": {"jax": "0.12.0"},
        "devices": {"count": 8, "kind": "TPU v5p", "memory_bytes": 95 * 2**30},
        "host": {"cpu": "EPYC", "memory_bytes": 2**35},
    } | changes


def make(run_dir, steps, run_record=None, value=lambda step: 1.0 + 1 / (step + 1), summary=True):
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "run.json").write_text(json.dumps(run_record or record()))
    with make_trackers(TrackConfig(tensorboard=False, console="off"), run_dir) as trackers:
        trackers.start({}, {}, start_step=0, total_steps=steps)
        for step in range(steps):
            trackers.log(step + 1, {name: value(step) for name in METRICS})
            if step % 10 == 9:
                trackers.log(step + 1, {"eval/loss": 2.0, "eval/bits_per_byte": 1.25})
        if summary:
            trackers.log_summary(
                {
                    "status": "finished",
                    "steps": steps,
                    "validation": {"loss": 2.0, "bits_per_byte": 1.25},
                    "baselines": {"bits_per_byte": {"unigram": 4.5}},
                }
            )
    html = write_report(run_dir).read_text()
    return html, Page(html)


def data_of(page):
    """Returns the data that the page draws."""
    return json.loads(next(text for text in page.texts["script"] if text.startswith('{"runs"')))


def test_golden_structure(tmp_path):
    html, page = make(tmp_path, 100)
    assert page.texts["h1"] == ["tiny"]
    assert page.texts["h2"] == [
        "Validation bits per byte, with baselines",
        "More charts",
        "Hardware",
        "Run statistics",
        "Config, changed from the defaults",
        "Environment",
    ]
    assert page.texts["h3"] == [
        "Loss",
        "Bits per byte",
        "Learning rate",
        "Gradient norm",
        "Throughput",
        "MFU",
        "Step time",
        "Memory",
    ]
    assert [chart["title"] for chart in data_of(page)["charts"]] == page.texts["h3"]
    assert "python -m launch train configs/tiny.py train.steps=100" in page.texts["code"]
    rows, cells = page.texts["th"], page.texts["td"]
    assert {"train.steps", "parameters", "versions.jax", "devices.kind", "host.cpu", "this run", "unigram"} <= set(rows)
    assert cells[cells.index("command line") - 1] == "100" and cells[cells.index("count") - 1] == "1,000,000"
    assert {"0.12.0", "TPU v5p", "95.00 GiB", "32.00 GiB", "EPYC", "1.2500", "4.5000"} <= set(cells)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], "no temporary file is left"


def test_it_is_self_contained_and_only_its_own_scripts_may_run(tmp_path):
    html, page = make(tmp_path, 20)
    assert not re.search(r"@import|url\(", html)
    assert not [name for name, _ in page.attributes if name in ("src", "href") or name.startswith("on")]
    scripts = [text for text in page.texts["script"] if not text.startswith('{"runs"')]
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{each}'" for each in hashes)
    policies = [value for name, value in page.attributes if name == "content"]
    assert len(hashes) == 2
    assert policies[0] == f"default-src 'none'; style-src 'unsafe-inline'; script-src {allowed}"
    assert "Copyright (c) 2022 Leon Sorokin" in html and "prefers-color-scheme: dark" in html


def test_everything_from_outside_is_escaped(tmp_path):
    evil = record(
        config={"name": EVIL, EVIL: EVIL},
        command=["train", EVIL],
        origins={EVIL: EVIL},
        derived={EVIL: [EVIL, EVIL]},
        versions={EVIL: EVIL},
    )
    make(tmp_path, 0, evil)
    with make_trackers(TrackConfig(tensorboard=False, console="off"), tmp_path) as trackers:
        trackers.start({}, {}, start_step=0, total_steps=2)
        for step in range(2):
            trackers.log(step + 1, {EVIL: 1.0 + step, f"device_{EVIL}_bytes": 1.0 + step})
        summary = {"error": EVIL, "validation": {EVIL: 1.0}, "baselines": {EVIL: {EVIL: 2.0}}, EVIL: EVIL}
        trackers.log_summary({"status": EVIL, **summary})
    page = Page(write_report(tmp_path).read_text())
    assert page.tags.count("script") == 3 and "img" not in page.tags
    assert page.texts["h1"] == [EVIL] and page.texts["title"] == [EVIL]
    assert EVIL in page.texts["h3"] and EVIL in [chart["title"] for chart in data_of(page)["charts"]]
    assert not [name for name, _ in page.attributes if name.startswith("on")]


@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("summary", [True, False])
def test_a_run_of_few_points(tmp_path, steps, summary):
    """One value is text, not a chart; only the loss always has its place."""
    html, page = make(tmp_path, steps, summary=summary)
    assert page.tags.count("figure") == (7 if steps == 2 else 1)
    assert ("No values logged yet." in html) is (steps == 0)
    assert ("Constant at all logged steps" in page.texts["h2"]) is (steps == 1)
    assert ("interrupted" in html) is not summary


def test_constants_are_text(tmp_path):
    make(tmp_path, 0)
    rows = [{"step": step, "loss": 2.0, "lr": 1e-3, "weight": 4096.0, "mfu": 0.3 + step} for step in range(1, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    page = Page(write_report(tmp_path).read_text())
    assert page.texts["h3"] == ["Loss", "MFU"]
    assert {"Learning rate", "weight"} <= set(page.texts["th"]) and {"0.001", "4096"} <= set(page.texts["td"])


def test_the_state_of_a_run(tmp_path):
    """Values come from the log where there is no summary; an error is shown; a stop is forgotten once it goes on."""
    html, page = make(tmp_path, 12, summary=False)
    assert "interrupted" in html
    tiles = dict(zip(page.texts["dt"], page.texts["dd"], strict=True))
    assert tiles["Steps"] == "12" and tiles["Validation bits per byte"] == "1.2500"
    (tmp_path / "summary.json").write_text(json.dumps({"status": "failed", "error": "step 11: loss is nan"}))
    page = Page(write_report(tmp_path).read_text())
    assert "failed" in page.texts["span"] and "step 11: loss is nan" in page.texts["p"]
    page = Page(write_report(tmp_path, is_running=True).read_text())
    assert "running" in page.texts["span"] and "step 11: loss is nan" not in page.texts["p"]


def test_baselines_before_the_end_and_in_the_curve_of_the_loss(tmp_path):
    """In nats, by the ratio of the validation loss to its bits per byte: 2 to 1.25 here."""
    levels = {}
    for name, run_record in {"none": record(), "some": record(baselines={"bits_per_byte": {"xz": 2.5}})}.items():
        _, page = make(tmp_path / name, 20, run_record, summary=False)
        levels[name] = {chart["title"]: chart["levels"] for chart in data_of(page)["charts"] if chart["levels"]}
    assert levels == {"none": {}, "some": {"Loss": [["xz", 4.0]], "Bits per byte": [["xz", 2.5]]}}


def test_without_a_record_there_is_no_report_and_damage_is_named(tmp_path):
    with raises(ConfigError, f"{tmp_path}: run.json"):
        write_report(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    Page(write_report(tmp_path).read_text())
    (tmp_path / "summary.json").write_text('{"st')
    with raises(StorageError, "summary.json:"):
        write_report(tmp_path)


def test_config_fields_are_those_of_show():
    config = {
        "name": "a b",
        "model": {"kind": "vit", "dim": 64, "dropout": None},
        "parts": [{"kind": "store", "weight": 0.5}, {"kind": "store", "weight": 1.5}],
        "betas": [0.9, 0.95],
        "empty": [],
    }
    assert config_leaves(config) == {
        "name": "'a b'",
        "model": "vit",
        "model.dim": "64",
        "model.dropout": "none",
        "parts.0": "store",
        "parts.0.weight": "0.5",
        "parts.1": "store",
        "parts.1.weight": "1.5",
        "betas": "(0.9, 0.95)",
        "empty": "()",
    }


def test_a_comparison_shows_results_and_differences(tmp_path):
    other = record(config={"name": "other", "train": {"steps": 50, "lr": 3e-4}})
    make(tmp_path / "tiny", 100)
    make(tmp_path / "other", 50, other, value=lambda step: 3.0 - step / 100)
    runs = [read_run(tmp_path / name, is_running=False) for name in ("tiny", "other")]
    page = Page(render_report(runs))
    assert page.texts["h1"] == ["tiny, other"]
    assert page.texts["h2"][0] == "Results"
    rows = page.texts["th"]
    assert {"Steps", "train.steps"} <= set(rows) and not {"train.lr", "name", "host.cpu"} & set(rows)
    cells = page.texts["td"]
    assert [cells[i : i + 2] for i, cell in enumerate(cells) if cell == "100"] == 2 * [["100", "50"]]
    loss = data_of(page)["charts"][0]["lines"]
    assert {(line["run"], line["color"]) for line in loss} == {(0, 0), (1, 1)}
    assert {line["label"].split(",")[0] for line in loss} == {"tiny", "other"}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, -1e30, 1e-30, 3e38])
def test_values_at_the_edge(tmp_path, value):
    html, page = make(tmp_path, 30, value=lambda step: value if step % 7 == 3 else 1.0 + step)
    drawn = data_of(page)
    assert not re.search(r"NaN|Infinity", json.dumps(drawn))
    values = [each for chart in drawn["charts"] for line in chart["lines"] for each in line["values"]]
    assert (str(value) in values) is not math.isfinite(value)
    assert (f"training is {value} at step 4 and 3 more times" in html) is not math.isfinite(value)
    make(tmp_path / "only", 3, value=lambda step: value)


def test_a_run_that_ended_without_finite_values(tmp_path):
    make(tmp_path, 3, summary=False)
    with make_trackers(TrackConfig(tensorboard=False, console="off"), tmp_path) as trackers:
        trackers.start({}, {}, start_step=3, total_steps=3)
        values = {"final_loss": math.nan, "steps": None, "wall_s": math.inf, "peak_rss_bytes": math.nan}
        scores, baselines = {"bits_per_byte": math.nan}, {"bits_per_byte": {"unigram": 4.5, "none": math.inf}}
        trackers.log_summary({**values, "validation": scores, "baselines": baselines})
    page = Page(write_report(tmp_path).read_text())
    assert dict(zip(page.texts["dt"], page.texts["dd"], strict=True)) == {
        "Wall time": "-",
        "Final training loss": "nan",
        "Validation bits per byte": "nan",
        "Peak host memory": "nan",
    }
    assert "unigram" in page.texts["th"] and "this run" not in page.texts["th"]


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path):
    make(tmp_path, 3)
    path = tmp_path / "report.html"
    before = path.read_bytes()
    (tmp_path / "summary.json").write_text("[]")
    with raises(StorageError, "summary.json:"):
        write_report(tmp_path)
    assert path.read_bytes() == before
