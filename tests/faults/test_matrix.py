"""Every row of the fault matrix in its small form, as `python -m launch faults` injects it, and the command itself."""

import os
import re
from pathlib import Path

import pytest

from jaxinfra import failpoints
from jaxinfra.cli.arguments import COMMANDS
from launch.__main__ import add_commands
from tests.faults import matrix
from tests.faults.harness import Harness, NotSurvived, NotTried
from tests.faults.matrix import Row, all_rows
from tests.refusals import names, refused
from tests.tiny_run import launch

ROWS = all_rows()


@pytest.fixture(scope="session")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    """One folder for all workers of the session: they share the data and the runs that nothing happens to."""
    base = tmp_path_factory.getbasetemp()
    return Harness((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "faults")


@pytest.mark.slow(15)
@pytest.mark.parametrize("each", ROWS, ids=[each.label for each in ROWS])
def test_a_run_survives(each: Row, harness: Harness) -> None:
    try:
        each.inject(harness)
    except NotTried as reason:
        assert "CI" not in os.environ, f"row {each.label} must be tried where all is installed: {reason}"
        pytest.skip(str(reason))


@pytest.fixture(autouse=True)
def faults_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adds the command for the time of a test."""
    monkeypatch.setitem(COMMANDS, "faults", COMMANDS["train"])
    add_commands()


def test_the_matrix_is_complete() -> None:
    assert [number for each in ROWS for number in each.numbers] == [*range(1, 51)]


def test_a_row_that_is_not_survived_fails_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def inject(harness: Harness) -> str:
        raise NotSurvived("another loss at step 3")

    bad = Row(numbers=(7,), fault="a fault", must="nothing", inject=inject)
    good = Row(numbers=(8,), fault="none", must="nothing", inject=lambda harness: "nothing | happened")
    monkeypatch.setattr("launch.faults.all_rows", lambda: [bad, good])
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- faults: begin -->\nold\n<!-- faults: end -->\nafter\n")
    ended = launch("faults", "--write", str(page), "--keep", str(tmp_path / "kept"))
    assert ended.code == 1
    names(ended.err.splitlines()[-1], "error: row 7: another loss at step 3 --only 7")
    assert "FAILED" in ended.out.splitlines()[0] and "survived" in ended.out.splitlines()[1]
    names(ended.err.splitlines()[-2], "2 rows: 1 survived, 0 not tried, 1 failed")
    text = page.read_text()
    assert "old" in page.read_text(), "a page has no rows that failed"
    monkeypatch.setattr("launch.faults.all_rows", lambda: [good])
    assert launch("faults", "--write", str(page), "--keep", str(tmp_path / "again")).code == 0
    text = page.read_text()
    assert r"| 8 | none | nothing | nothing \| happened | 0 |" in text and "old" not in text
    assert text.startswith("before\n") and text.endswith("after\n")
    monkeypatch.setattr("launch.faults.all_rows", lambda: [bad, good])
    assert launch("faults", "--only", "8", "--keep", str(tmp_path / "new")).code == 0
    for words, named, code in (
        (("--only", "9"), "--only 9: no row 9 1 to 8", 81),
        (("--only", "x"), "no row x --only 19,20", 81),
        (("--only", "8", "--write", str(page)), f"--only 8 --write {page}", 81),
        (("--keep", str(tmp_path)), f"--keep {tmp_path}: is not empty", 81),
        (("--write", str(tmp_path / "kept.md")), "kept.md", 82),
    ):
        refused(launch("faults", *words), named, code=code)


def test_a_row_that_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "_rows", [])

    @matrix.row(99, fault="nothing", must="have a new folder")
    def inject(harness: Harness) -> str:
        return f"found {[path.name for path in harness.folder.iterdir()]}"

    ended = launch("faults", "--only", "99")
    assert ended.code == 0 and "99  survived" in ended.out and "nothing: found ['runs']" in ended.out, ended


def test_a_row_that_is_not_tried_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def inject(harness: Harness) -> str:
        raise NotTried("a tool is missing; install it")

    untried = Row(numbers=(7, 8), fault="a fault", must="nothing", inject=inject)
    monkeypatch.setattr("launch.faults.all_rows", lambda: [untried])
    page = tmp_path / "page.md"
    page.write_text("<!-- faults: begin -->\n<!-- faults: end -->\n")
    ended = launch("faults", "--write", str(page))
    assert ended.code == 0 and "not tried" in ended.out and "survived" not in ended.out
    names(ended.err.splitlines()[-1], "2 rows: 0 survived, 2 not tried, 0 failed")
    assert "| **not tried**: a tool is missing; install it |" in page.read_text()


@pytest.mark.parametrize(
    "text", ["step", "step:0:1", "stop:0:1:kill", "step:0:1:sleep=x", "step:a:1:kill", "step:0:1:die"]
)
def test_a_wrong_failpoint_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXINFRA_FAIL", text)
    ended = launch("models")
    refused(ended, f"JAXINFRA_FAIL={text} POINT:RANK:STEP:ACTION JAXINFRA_FAIL=step:0:20:kill")


def test_a_failpoint_acts_once_where_and_when_it_is_asked_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JAXINFRA_FAIL", "log:*:3:raise,log:1:4:raise,data:0:*:enospc")
    monkeypatch.setenv("JAXINFRA_FAIL_LOG", str(tmp_path))
    failpoints.failpoint("log", 2)
    failpoints.failpoint("step", 3)
    with pytest.raises(RuntimeError, match="log:[*]:3:raise at step 3"):
        failpoints.failpoint("log", 3)
    failpoints.failpoint("log", 3)
    failpoints.failpoint("log", 4)  # this is process 0
    for step in (1, 2):
        with pytest.raises(OSError, match="No space left on device"):
            failpoints.failpoint("data", step)
    written = ["data:0:*:enospc", "data:0:*:enospc@0", "log:*:3:raise", "log:*:3:raise@0"]
    assert sorted(path.name for path in tmp_path.iterdir()) == written


def test_the_page_shows_each_row_and_failpoint(repo_root: Path) -> None:
    page = (repo_root / "docs/faults.md").read_text()
    lines = [f"| {each.label} | {each.fault} | {each.must} | " for each in ROWS]
    assert not [line for line in lines if line not in page], "docs/faults.md lacks these lines"
    assert "**" not in page.partition("## The matrix")[2], "a row of the page has failed"
    for point, where in failpoints.POINTS.items():
        assert f"| `{point}` | {where}" in page.replace("`summary.json`", "summary.json")
    for action in failpoints.ACTIONS:
        assert f"`{action}`" in page
    (shown,) = re.findall(r"JAXINFRA_FAIL=([a-z.:0-9]+) python -m launch", page)
    assert [str(each) for each in failpoints.parse_failpoints(shown)] == [shown]
