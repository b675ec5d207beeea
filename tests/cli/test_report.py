"""`report`: the page of a run in any state, and one that compares several."""

import json
from html import escape

from jaxinfra.storage.lease import hold
from jaxinfra.track.jsonl import JsonlTracker, read_samples
from tests.refusals import refused
from tests.servers.fixtures import Server
from tests.tiny_run import Tiny, launch, summary
from tests.track.test_report import make, record


def test_a_run_in_any_state(tmp_path):
    make(tmp_path / "run", 12, summary=False)
    page = tmp_path / "run" / "report.html"
    page.unlink()
    ended = launch("report", str(tmp_path / "run"))
    assert (ended.code, ended.out) == (0, f"wrote {page}; open it in a browser\n")
    assert ">interrupted<" in page.read_text()
    with hold(tmp_path / "run"):
        assert launch("report", str(tmp_path / "run")).code == 0
    assert ">running<" in page.read_text()


def test_several_runs(tmp_path):
    for name in "ab":
        make(tmp_path / name, 12, record(config={"name": name}))
    runs = [str(tmp_path / name) for name in "ab"]
    assert launch("report", *runs).out.startswith(f"wrote {tmp_path / 'comparison.html'}; ")
    other = tmp_path / "other.html"
    assert launch("report", *runs, "--output", str(other)).code == 0
    assert other.read_text() == (tmp_path / "comparison.html").read_text()
    assert ">a, b</h1>" in other.read_text()
    make(tmp_path / "again", 12, record(config={"name": "a"}))
    assert launch("report", runs[0], str(tmp_path / "again"), "--output", str(other)).code == 0
    assert f">{tmp_path / 'a'}, {tmp_path / 'again'}</h1>" in other.read_text()


def test_a_page_in_a_bucket(tmp_path, s3: Server):
    make(tmp_path / "run", 12)
    url = f"{s3.new_url()}/page.html"
    assert launch("report", str(tmp_path / "run"), "--output", url).out == f"wrote {url}; open it in a browser\n"
    assert s3.get(url) == (tmp_path / "run" / "report.html").read_bytes()
    refused(launch("report", str(tmp_path / "run"), "--output", "s3://bucket"), "s3://bucket: s3://BUCKET/FILE")


def test_bad_input(tmp_path):
    refused(launch("report", str(tmp_path / "none")), "none: run.json")
    for name in ("story-92358e", "stories"):  # neither says that it is a variant of story
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text("{}")
    for command in (("report",), ("sample", "--seed=1")):
        prompt = ("Once",) if command[0] == "sample" else ()
        refused(launch(*command, str(tmp_path / "story"), *prompt), f"{tmp_path}/story: run.json runs/quickstart")
    refused(launch("report", *(str(tmp_path / str(i)) for i in range(9))), "9 8")
    make(tmp_path / "run", 3)
    refused(
        launch("report", str(tmp_path / "run"), "--output", str(tmp_path / "none" / "a.html")), "none/a.html", code=82
    )
    (tmp_path / "run" / "run.json").write_text("[]")
    refused(launch("report", str(tmp_path / "run")), "run.json", code=82)
    (tmp_path / "run" / "run.json").write_text("{")
    refused(launch("report", str(tmp_path / "run")), "run.json", code=82)


def test_the_record_has_host_and_baselines(begun: Tiny, monkeypatch):
    """They are there before the end; the summary of the stop is gone while the run goes on."""
    seen = []

    def log(self, step, metrics):
        seen.append((begun.directory() / "summary.json").exists())
        plain(self, step, metrics)

    plain = JsonlTracker.log
    monkeypatch.setattr(JsonlTracker, "log", log)
    assert (begun.directory() / "summary.json").exists()
    assert begun.launch().code == 0
    assert seen and not any(seen)
    record = json.loads((begun.directory() / "run.json").read_text())
    assert record["host"]["cores"] >= 1 and record["host"]["memory_bytes"] > 2**30 and record["host"]["cpu"]
    assert record["baselines"] == summary(begun.directory())["baselines"]


def test_samples_at_evaluations(tiny: Tiny) -> None:
    """Each continues the prompt; they are in the page, the newest first."""
    assert tiny.launch("track.sample_prompt=w1 w8", "name=sampled").code == 0
    samples = read_samples(tiny.directory("sampled") / "samples.jsonl")
    assert [step for step, _ in samples] == [5, 10, 12]
    assert all(text.startswith("w1 w8") and len(text) > len("w1 w8") for _, text in samples)
    html = (tiny.directory("sampled") / "report.html").read_text()
    assert html.index("step 12") < html.index("step 10<") < html.index("step 5<")
    assert escape(samples[-1][1]) in html
