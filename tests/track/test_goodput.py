"""The ledger of a run's time: what counts as lost and as down, and the model of failures against a simulation."""

import json
import random
from pathlib import Path

import pytest

from jaxinfra.track.goodput import CLASSES, Goodput, Model, account, model, read_ledger, total
from jaxinfra.track.timeline import COLUMNS, HEIGHT, timeline

START_S = 1.7e9


def write(folder: Path, *rows: dict) -> Path:
    path = folder / "goodput.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(
    attempt: int, t: float, completed: int = 0, /, *, saves: int = 0, start: float | None = None, **seconds: float
) -> dict:
    """A row of the ledger; what is not in `seconds` is "init"."""
    known = {"from": {1: 0, 2: 20, 3: 10}[attempt], "resumes": 1}
    if start is not None:
        known = {"start": START_S + start, "from": None, "resumes": 0}
    seconds["init"] = t - sum(seconds.values())
    return {"attempt": attempt, "t": t, "phase": "step", "step": completed, "saves": saves, "seconds": seconds} | known


def test_every_second_has_a_class(tmp_path: Path) -> None:
    """Attempt 1 is killed after step 40 and goes on after 20; attempt 2 is killed, and attempt 3 goes on after 10."""
    path = write(
        tmp_path,
        row(1, 10.0, start=0.0),
        row(1, 30.0, 10, step=15.0, device=5.0),
        row(1, 52.0, 20, saves=1, step=15.0, device=25.0, save=2.0),
        row(1, 92.0, 40, saves=1, step=15.0, device=65.0, save=2.0),
        row(2, 5.0, start=100.0),
        row(2, 65.0, 50, step=60.0),
        row(1, 300.0, 90, step=288.0),  # attempt 1 was only stopped: it finds the run in other hands
        row(3, 5.0, start=170.0),
        row(3, 35.0, 25, step=20.0, data=10.0),
    )
    path.write_bytes(path.read_bytes() + b'{"attempt": 3, "t": 99')  # torn by a kill
    run = account(read_ledger(path))
    assert run.wall_s == pytest.approx(205.0)
    assert run.attempts == 3 and run.starts_s == pytest.approx([0.0, 100.0, 170.0])
    kept_s = 20.0 + 20.0  # ten steps of attempt 1, and attempt 3
    assert run.seconds == pytest.approx(
        {"init": 20.0, "step": kept_s, "save": 2.0, "data": 10.0, "lost": 20.0 + 40.0 + 60.0, "down": 8.0 + 5.0}
    )
    assert run.fraction == pytest.approx(kept_s / 205.0)
    assert sum(each.end_s - each.begin_s for each in run.intervals) == pytest.approx(run.wall_s)
    assert total([run, run]).wall_s == pytest.approx(410.0)


def test_steps_between_two_rows_are_lost_in_part(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        row(1, 10.0, start=0.0),
        row(1, 110.0, 40, step=100.0),
        row(2, 10.0, start=110.0),
        row(2, 20.0, 25, step=10.0),
    )
    assert account(read_ledger(path)).seconds == pytest.approx({"init": 20.0, "step": 50.0 + 10.0, "lost": 50.0})


def test_a_run_that_goes_back_without_a_restart(tmp_path: Path) -> None:
    back = row(1, 80.0, 30, step=70.0) | {"from": 25, "resumes": 2}
    path = write(tmp_path, row(1, 10.0, start=0.0), row(1, 60.0, 50, step=50.0), back)
    assert account(read_ledger(path)).seconds == pytest.approx({"init": 10.0, "step": 25.0 + 20.0, "lost": 25.0})


def test_a_clock_that_was_set_back(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        row(1, 10.0, start=0.0),
        row(1, 60.0, 20, step=50.0),
        row(2, 10.0, start=-3600.0),
        row(2, 40.0, 30, step=30.0),
    )
    run = account(read_ledger(path))
    assert run.seconds == pytest.approx({"init": 20.0, "step": 80.0})


def simulated(stall_s: float, interval_s: float, restart_s: float, mtbf_s: float, saves: int = 40_000) -> float:
    """The goodput of a run that fails at random times: each interval, with its save, is tried until none hits it."""
    draw, wall_s = random.Random(0), 0.0
    for _ in range(saves):
        while (failure_s := draw.expovariate(1 / mtbf_s)) < interval_s + stall_s:
            wall_s += failure_s
            while (failure_s := draw.expovariate(1 / mtbf_s)) < restart_s:
                wall_s += failure_s
            wall_s += restart_s
        wall_s += interval_s + stall_s
    return saves * interval_s / wall_s


@pytest.mark.parametrize("measured", [(5.0, 600.0, 120.0, 11_160.0), (30.0, 900.0, 300.0, 3600.0)])
def test_the_model_is_what_a_simulation_gives(measured: tuple[float, float, float, float]) -> None:
    stall_s, interval_s, restart_s, mtbf_s = measured

    def modelled(interval_s: float) -> Model:
        run = Goodput(attempts=2, seconds={}, stalls_s=[stall_s], save_intervals_s=[interval_s], restarts_s=[restart_s])
        found = model(run, mtbf_s)
        assert found is not None
        return found

    expected = modelled(interval_s)
    assert expected.goodput == pytest.approx(simulated(*measured), rel=0.01)
    best_s = expected.best_interval_s
    assert all(expected.best_goodput >= modelled(each).goodput for each in (0.8 * best_s, 1.25 * best_s, interval_s))


def test_the_time_line_shows_all_time(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        row(1, 10.0, start=0.0),
        row(1, 60.0, 20, saves=1, step=48.0, save=2.0),
        row(2, 10.0, start=100.0),
        row(2, 40.0, 30, step=30.0),
    )
    run = account(read_ledger(path))
    line = timeline(run)
    area = {kind: sum(bar.width * bar.height for bar in line.bars if bar.kind == kind) for kind in CLASSES}
    for kind, seconds in run.seconds.items():
        assert area[kind] == pytest.approx(COLUMNS * HEIGHT * seconds / run.wall_s, rel=0.02), kind
    assert line.starts == [pytest.approx(COLUMNS * 100 / 140, abs=0.1)]
    assert len(line.bars) < 20, "equal columns are one bar"
