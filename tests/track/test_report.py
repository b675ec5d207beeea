import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser

import pytest

from jaxinfra.errors import StorageError
from jaxinfra.track.charts import downsample
from jaxinfra.track.config import TrackConfig
from jaxinfra.track.report import write_report
from jaxinfra.track.tracker import make_trackers
from tests.refusals import raises

EVIL = "</td></script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&"
VOID = {"meta", "link", "br", "img", "input", "hr"}
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
        "derived": {"parameters": [1_000_000, "count"]},
        "versions": {"jax": "0.12.0"},
        "devices": ["cpu:0"],
    } | changes


def make(run_dir, steps, run_record=None, value=lambda step: 1.0 + 1 / (step + 1), summary=True):
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "run.json").write_text(json.dumps(run_record or record()))
    with make_trackers(TrackConfig(tensorboard=False, console="off"), run_dir) as trackers:
        trackers.start({}, {}, start_step=0, total_steps=steps)
        for step in range(steps):
            trackers.log(step, {name: value(step) for name in METRICS})
            if step % 10 == 9:
                trackers.log(step, {"eval/loss": 2.0, "eval/bits_per_byte": 1.25})
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


def test_golden_structure(tmp_path):
    html, page = make(tmp_path, 100)
    assert page.texts["h1"] == ["tiny"]
    assert page.texts["h2"] == [
        "Validation bits per byte, with baselines",
        "Over steps",
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
    assert "python -m launch train configs/tiny.py train.steps=100" in page.texts["code"]
    cells = page.texts["td"]
    assert cells[cells.index("train.steps") :][:3] == ["train.steps", "100", "command line"]
    assert cells[cells.index("parameters") :][:3] == ["parameters", "1,000,000", "count"]
    assert cells[cells.index("versions.jax") + 1] == "0.12.0"
    assert cells[cells.index("this run") :][:4] == ["this run", "1.2500", "unigram", "4.5000"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], "no temporary file is left"


def test_it_is_self_contained_and_only_its_own_script_may_run(tmp_path):
    html, page = make(tmp_path, 20)
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", html)
    assert not [name for name, _ in page.attributes if name in ("src", "href") or name.startswith("on")]
    (script,) = page.texts["script"]
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policies = [value for name, value in page.attributes if name == "content"]
    assert policies[0] == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    assert "prefers-color-scheme: dark" in html


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
        trackers.log(0, {EVIL: 1.0, f"device_{EVIL}_bytes": 1.0})
        trackers.log_summary({"status": EVIL, "validation": {EVIL: 1.0}, "baselines": {EVIL: {EVIL: 2.0}}, EVIL: EVIL})
    page = Page(write_report(tmp_path).read_text())
    assert page.tags.count("script") == 1 and "img" not in page.tags
    assert page.texts["h1"] == [EVIL] and page.texts["title"] == [EVIL]
    assert [value for _, value in page.attributes].count(f"{EVIL} over steps") == 1
    assert not [name for name, _ in page.attributes if name.startswith("on")]


@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("summary", [True, False])
def test_a_run_of_few_points(tmp_path, steps, summary):
    html, page = make(tmp_path, steps, summary=summary)
    assert page.tags.count("figure") == 7
    assert page.tags.count("circle") == (len(METRICS) if steps == 1 else 0)
    assert ("not finished" in html) is not summary


def test_the_record_alone_is_enough_and_without_it_there_is_no_report(tmp_path):
    with raises(StorageError, "run.json:"):
        write_report(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    Page(write_report(tmp_path).read_text())
    (tmp_path / "summary.json").write_text('{"st')
    with raises(StorageError, "summary.json:"):
        write_report(tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, -1e30, 1e-30, 3e38])
def test_values_at_the_edge(tmp_path, value):
    html, page = make(tmp_path, 30, value=lambda step: value if step % 7 == 3 else 1.0 + step)
    coordinates = [text for name, text in page.attributes if name in ("d", "x", "y", "cx", "cy")]
    assert coordinates and not [text for text in coordinates if "nan" in text or "inf" in text]
    broken = [text for name, text in page.attributes if name == "class" and text == "broken"]
    assert len(broken) == (0 if math.isfinite(value) else 4 * len(METRICS))
    only, _ = make(tmp_path / "only", 3, value=lambda step: value)
    assert "NaN" not in only.split("<script>")[0]


def test_many_points_keep_their_spikes_and_gaps(tmp_path):
    points = [(step, 1.0 + step % 7 / 100) for step in range(100_000)]
    points[61_803] = (61_803, 50.0)
    points[27_182] = (27_182, -50.0)
    points[31_415] = (31_415, math.nan)
    kept = downsample(points)
    assert len(kept) <= 4 * 600 + 1
    assert {points[0], points[61_803], points[27_182], points[-1]} <= set(kept)
    assert any(step == 31_415 for step, _ in kept)
    assert [step for step, _ in kept] == sorted({step for step, _ in kept})
    rows = "".join(
        f'{{"step": {step}, "loss": {value if value == value else json.dumps("nan")}}}\n' for step, value in points
    )
    (tmp_path / "run.json").write_text(json.dumps(record()))
    (tmp_path / "metrics.jsonl").write_text(rows)
    path = write_report(tmp_path)
    assert path.stat().st_size < 200_000
    Page(path.read_text())


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
    assert "unigram" in page.texts["td"] and "this run" not in page.texts["td"]


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path):
    make(tmp_path, 3)
    path = tmp_path / "report.html"
    before = path.read_bytes()
    (tmp_path / "summary.json").write_text("[]")
    with raises(StorageError, "summary.json:"):
        write_report(tmp_path)
    assert path.read_bytes() == before
