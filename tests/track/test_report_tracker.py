import json
import time

import pytest

from jaxinfra.errors import NonFiniteError
from jaxinfra.track import report_tracker
from jaxinfra.track.config import TrackConfig
from jaxinfra.track.report import EVERY_S, read_run, render_report, write_report
from jaxinfra.track.tracker import make_trackers
from tests.track.test_report import Page, data_of, make, record

QUIET = TrackConfig(tensorboard=False, console="off")


def test_a_run_that_goes_on_has_a_page(tmp_path, monkeypatch):
    monkeypatch.setattr(report_tracker, "_FIRST_S", 0.01)
    (tmp_path / "run.json").write_text(json.dumps(record()))
    page = tmp_path / "report.html"
    with make_trackers(QUIET, tmp_path) as trackers:
        trackers.start({}, {}, start_step=0, total_steps=9)
        trackers.log(0, {"loss": 2.0})
        deadline = time.monotonic() + 600
        while not page.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert ">running<" in page.read_text()
    assert ">interrupted<" in page.read_text()


def test_pages_of_a_run_that_goes_on_take_a_small_share_of_its_time(tmp_path, monkeypatch):
    """However long one takes to make; a short run gets one every few seconds."""
    (tmp_path / "run.json").write_text(json.dumps(record()))
    for name, value in (("_FIRST_S", 0.0), ("EVERY_S", 0.01), ("_MAX_SHARE", 0.2)):
        monkeypatch.setattr(report_tracker, name, value)
    made, start_s = [], time.monotonic()
    monkeypatch.setattr(report_tracker, "write_report", lambda *_, **__: made.append(time.sleep(0.05)))
    with make_trackers(QUIET, tmp_path) as trackers:
        trackers.start({}, {}, start_step=0, total_steps=9)
        while len(made) < 4:
            time.sleep(0.01)
    assert time.monotonic() - start_s >= 3 * 0.05 / 0.2


def test_only_the_page_of_one_run_that_goes_on_loads_itself_again(tmp_path):
    """For an hour: nobody writes the page of a run that was killed."""
    reloads = {}
    for state, is_running in (("running", True), ("interrupted", False)):
        make(tmp_path / state, 3, summary=False)
        page = Page(write_report(tmp_path / state, is_running=is_running).read_text())
        reloads[state] = data_of(page)["reload"]
    assert reloads["interrupted"] is None and reloads["running"]["everyMs"] == 1000 * EVERY_S
    assert 0 < reloads["running"]["untilMs"] / 1000 - time.time() <= 3600
    several = Page(render_report(2 * [read_run(tmp_path / "running", is_running=True)]))
    assert data_of(several)["reload"] is None


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (NonFiniteError("step 1: loss is nan"), "step 1: loss is nan"),
        (ValueError("two\nlines"), "ValueError two lines"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
    ],
    ids=["NaN", "a bug", "an interrupt"],
)
def test_a_run_that_an_error_ended_has_a_page_that_names_it(tmp_path, error, said):
    (tmp_path / "run.json").write_text(json.dumps(record()))
    with pytest.raises(type(error)), make_trackers(QUIET, tmp_path) as trackers:
        trackers.start({}, {}, start_step=0, total_steps=9)
        trackers.log(0, {"loss": 2.0})
        raise error
    assert json.loads((tmp_path / "summary.json").read_text()) == {"status": "failed", "error": said}
    html = (tmp_path / "report.html").read_text()
    assert ">failed<" in html and said in html


def test_a_damaged_file_does_not_end_a_run_before_its_end(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(report_tracker, "_FIRST_S", 0.01)
    (tmp_path / "run.json").write_text("{")
    trackers = make_trackers(QUIET, tmp_path)
    trackers.start({}, {}, start_step=0, total_steps=9)
    deadline = time.monotonic() + 600
    while "run.json" not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "run.json" in caplog.text
    (tmp_path / "run.json").write_text(json.dumps(record()))
    trackers.close()
    assert (tmp_path / "report.html").exists()
