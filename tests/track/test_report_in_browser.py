"""The page in a browser: what the charts show, by pointer, by keyboard, narrow and in print."""

import json
import math
import time
from contextlib import suppress

import pytest

from jaxinfra.track import report
from jaxinfra.track.report import read_run, render_report, write_report
from tests.track.browser import open_browser
from tests.track.test_report import EVIL, make, record

LEGEND = (
    "[...document.querySelectorAll('#chart-0 .u-series')].map((row) => "
    "`${row.querySelector('th').innerText} ${row.querySelector('td').innerText}`)"
)
WIDTHS = "[...document.querySelectorAll('canvas')].map((each) => each.getBoundingClientRect().width)"
NUMBERS = "[...document.querySelectorAll('td')].filter((cell) => /^[\\d.,]+$/.test(cell.innerText))"
LINES_OF_NUMBERS = f"""{NUMBERS}.map((cell) => {{
    const range = document.createRange();
    range.selectNodeContents(cell);
    return range.getClientRects().length;
}})"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(autouse=True)
def no_errors(page):
    page.errors.clear()
    yield
    assert page.errors == []


def choose(page, axis, *checked):
    """Chooses the horizontal axis, and checks boxes."""
    boxes = "".join(f"document.getElementById('{name}').checked = true;" for name in checked)
    page.evaluate(
        f"document.getElementById('axis').value = '{axis}'; {boxes}"
        "document.querySelector('.controls').dispatchEvent(new Event('change'))"
    )


def test_legends_by_keyboard_on_each_axis(tmp_path, page):
    """The arrows move through the values, in all charts; Enter hides a line."""
    make(tmp_path, 100, value=lambda step: 5.0 - step / 100)
    page.open(tmp_path / "report.html")
    assert page.evaluate(LEGEND)[:2] == ["steps last", "training 4.0100"]
    page.evaluate("document.getElementById('chart-0').focus()")
    page.press("End")
    page.press("ArrowLeft")
    page.press("ArrowLeft")
    assert page.evaluate(LEGEND) == [
        "steps 98",
        "training 4.0300",
        "training, mean of 5 logged 4.0300",
        "validation 2.0000",
        "unigram 7.2000",
    ]
    assert "98" in page.evaluate("document.querySelector('#chart-2 .u-legend').innerText")
    page.press("Home")
    assert page.evaluate(LEGEND)[:2] == ["steps 1", "training 5.0000"]
    page.press("Escape")
    assert page.evaluate(LEGEND)[0] == "steps last"
    page.press("Tab")
    page.press("Enter")
    assert page.evaluate("document.querySelector('#chart-0 .u-series.u-off').innerText").startswith("training")
    choose(page, "tokens", "log-x", "log-y")
    page.evaluate("document.getElementById('chart-0').focus()")
    page.press("Home")
    assert page.evaluate(LEGEND)[0] == "tokens 4096"
    choose(page, "time")
    page.evaluate("document.getElementById('chart-0').focus()")
    page.press("End")
    assert page.evaluate(LEGEND)[0].endswith(" s")


def test_zoom_is_the_same_in_all_charts(tmp_path, page):
    make(tmp_path, 101)
    page.open(tmp_path / "report.html")
    ranges = "plots.map(({ plot }) => `${plot.scales.x.min} to ${plot.scales.x.max}`)"
    assert set(page.evaluate(ranges)) == {"1 to 101"}
    page.evaluate("document.getElementById('chart-0').focus()")
    page.press("+")
    assert set(page.evaluate(ranges)) == {"26 to 76"}
    page.press("Escape")
    assert set(page.evaluate(ranges)) == {"1 to 101"}


@pytest.mark.parametrize("width", [400, 800, 1400])
def test_nothing_is_wider_than_the_window(tmp_path, page, width):
    make(tmp_path, 100, record(config={"name": "n" * 200, "p" * 100: "v" * 100}, origins={"p" * 100: "x" * 100}))
    page.open(tmp_path / "report.html", width=width, dark=width == 800)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    widest = "Math.max(...[...document.querySelectorAll('canvas')].map((each) => each.getBoundingClientRect().right))"
    assert page.evaluate(widest) < width
    drawn = "new Set(document.querySelector('#chart-0 canvas').getContext('2d').getImageData(0, 0, 300, 200).data).size"
    assert page.evaluate(drawn) > 2, "something is drawn"
    page.resize(2000 - width)
    page.evaluate("new Promise((done) => setTimeout(done, 100))")
    assert page.evaluate(widest) < 2000 - width


def test_numbers_are_not_broken_in_narrow_tables(tmp_path, page):
    make(
        tmp_path,
        10,
        record(derived={f"statistic {i}": [i / 7, "a unit or a formula of some length"] for i in range(9)}),
    )
    for width in (400, 700, 899):
        page.open(tmp_path / "report.html", width=width)
        lines = page.evaluate(LINES_OF_NUMBERS)
        assert len(lines) >= 9 and set(lines) == {1}


def test_it_prints_with_its_charts(tmp_path, page):
    """As wide as the paper, whatever the window was, and on white."""
    make(tmp_path, 100)
    page.open(tmp_path / "report.html", width=2000, dark=True)
    page.evaluate(f"addEventListener('beforeprint', () => {{ window.printed = {WIDTHS}; }})")
    assert page.pdf().startswith(b"%PDF")
    widths = page.evaluate("window.printed")
    assert len(widths) == 8 and max(widths) <= 700 and max(widths[1:]) <= 350
    assert page.evaluate(WIDTHS)[0] > 700


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -1e30, 1e-30, 3e38, 2.0])
def test_values_at_the_edge(tmp_path, page, value):
    for steps in (1, 30):
        make(tmp_path / str(steps), steps, value=lambda step: value if step % 7 in (0, 3) else 1.0 + step)
        page.open(tmp_path / str(steps) / "report.html")
        choose(page, "time", "log-x", "log-y")
        choose(page, "tokens")


def test_a_page_of_a_run_that_goes_on_loads_itself_again_as_it_was(tmp_path, page, monkeypatch):
    """With its choices, its zoom, what is open and its position; not once the run has ended."""
    make(tmp_path, 100)

    def write(every_s):
        monkeypatch.setattr(report, "EVERY_S", every_s)
        return write_report(tmp_path, is_running=True)

    page.open(write(1000.0))
    choose(page, "time", "log-y")
    page.evaluate("document.querySelector('details').open = true")
    page.evaluate("plots[0].plot.setScale('x', { min: 0.001, max: 0.002 })")
    page.evaluate("scrollTo(0, 300)")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 101, "time_s": 9.0, "loss": 1.0}) + "\n")
    write(1000.0)
    page.evaluate("data.reload.everyMs = 1, reloadLater()")
    wait_until(page, "data.charts[0].lines[0].steps.at(-1) === 101 && document.readyState === 'complete'")
    choices = "[control('axis').value, control('log-y').checked, control('log-x').checked]"
    assert page.evaluate(choices) == ["time", True, False]
    assert page.evaluate("document.querySelector('details').open") and abs(page.evaluate("scrollY") - 300) < 30
    assert page.evaluate("plots.every(({ plot }) => plot.scales.x.max === 0.002)")
    write(0.1)
    page.evaluate("data.reload.everyMs = 1, reloadLater()")
    wait_until(page, "data.reload?.everyMs === 100")
    write_report(tmp_path)
    wait_until(page, "data.reload === null")


def wait_until(page, expression):
    """Waits for a page that loads itself again; while it does, there is nothing to evaluate."""
    deadline_s = time.monotonic() + 600
    while time.monotonic() < deadline_s:
        with suppress(AssertionError):
            if page.evaluate(expression):
                return
        time.sleep(0.05)
    raise AssertionError(expression)


def test_text_from_outside_is_only_text(tmp_path, page):
    make(tmp_path, 0, record(config={"name": EVIL}))
    rows = [{"step": step, "loss": 2.0 + step, EVIL: step} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    page.open(write_report(tmp_path))
    assert page.evaluate("document.title") == EVIL
    assert page.evaluate("document.querySelectorAll('img').length") == 0
    assert EVIL in page.evaluate("document.querySelector('#chart-1 .u-legend').innerText")


def test_a_comparison(tmp_path, page):
    make(tmp_path / "a", 100, record(config={"name": "a"}))
    make(tmp_path / "b", 30, record(config={"name": "b"}), value=lambda step: 3.0 - step / 100)
    make(tmp_path / "c", 0, record(config={"name": "c"}), summary=False)
    path = tmp_path / "all.html"
    path.write_text(render_report([read_run(tmp_path / name, is_running=False) for name in "abc"]), encoding="utf-8")
    page.open(path, width=400)
    hidden = "[...document.querySelectorAll('#chart-0 .u-series')].map((row) => row.offsetWidth === 0)"
    shown = [row for row, is_hidden in zip(page.evaluate(LEGEND), page.evaluate(hidden), strict=True) if not is_hidden]
    assert [row.split(",")[0] for row in shown[1:-1]] == ["a", "a", "b", "b"]
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


@pytest.mark.slow
def test_a_long_run_is_a_small_page(tmp_path, page):
    (tmp_path / "run.json").write_text(json.dumps(record()))
    names = ("loss", "grad_norm", "lr", "tokens_per_s", "step_time_s", "mfu", "data_wait_s", "rss_bytes")
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(1, 100_001):
            file.write(
                json.dumps({"step": step, "time_s": step / 3, **dict.fromkeys(names, 1 + step * 7919 % 97 / 97)}) + "\n"
            )
    path = write_report(tmp_path)
    assert path.stat().st_size < 3_000_000
    page.open(path)
    points = page.evaluate("data.charts[0].lines.map((line) => line.steps.length)")
    assert 600 <= max(points) <= 2401
