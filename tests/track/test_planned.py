"""A run compared with its plan: what is off is named in one line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from jaxinfra.errors import ConfigError
from jaxinfra.track.planned import Terms, measure, plan_rows, read_plan, slow_devices, verdict
from tests.refusals import names, raises, refused
from tests.tiny_run import Tiny, launch
from tests.tiny_run import tiny as tiny
from tests.tiny_run import tiny_data as tiny_data

PLAN = Terms(
    estimate_s=0.1, device_s=0.09, host_s=0.01, save_s=0.2, slowest=1, slow_process_s=0.001, memory_bytes=1e9
)  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"estimate_s": 0.11, "device_s": 0.1}, "as planned"),
        ({"estimate_s": 0.16, "data_s": 0.06}, "waiting for data 60.0 ms 60.0%"),
        ({"save_s": 2.2, "saves_per_step": 0.05}, "saves stall 100.0 ms"),
        ({"estimate_s": 0.2, "device_s": 0.19}, "links between processes 100.0 ms"),
        ({"estimate_s": 0.2, "device_s": 0.19, "slowest": None}, "devices take 100.0 ms"),
        ({"estimate_s": 0.2, "device_s": 0.19, "slow_process_s": 0.09}, "process 1 slow 100.0 ms"),
        (
            {"estimate_s": 0.2, "device_s": 0.19, "device_slowdown": 2.0, "slowest_devices": 1},
            "devices process 1 compute slowly 100.0 ms",
        ),
        (  # they explain 30 of 100 ms
            {"estimate_s": 0.2, "device_s": 0.19, "device_slowdown": 1.33, "slowest_devices": 1},
            "links between processes 100.0 ms",
        ),
        ({"estimate_s": 0.126, "device_s": 0.104, "data_s": 0.012}, "processes 14.0 ms"),
        ({"estimate_s": 0.2, "host_s": 0.11}, "host 100.0 ms"),
        ({"estimate_s": 0.4, "host_s": 0.31, "compiles": 1.0}, "1 program is compiled 300.0 ms"),
        ({"memory_bytes": 2e9}, "memory off 1.86 GiB 953.67 MiB"),
    ],
    ids=[
        "noise",
        "data",
        "save",
        "link",
        "device",
        "rank",
        "chips",
        "hardly",
        "a bit of all",
        "host",
        "recompile",
        "memory",
    ],
)
def test_what_is_off_is_named(changed: dict[str, float], named: str) -> None:
    line = names(verdict(replace(PLAN, **changed), PLAN), named)
    assert line.startswith("as planned") is (named == "as planned")


def test_slow_devices_are_those_of_half_of_the_measurements() -> None:
    """Each row of metrics repeats the last measurement."""

    def rows(*measurements: tuple[int, float]) -> list[dict[str, float]]:
        values = [{"slowest_devices": process, "slowest_devices_slowdown": slow} for process, slow in measurements]
        return [{"loss": 1.0}, *(row for row in values for _ in range(3))]

    assert slow_devices(rows()) == slow_devices(rows((1, 2.0))) == (None, 1.0)
    assert slow_devices(rows((1, 2.0), (1, 1.6))) == (1, 1.6)
    assert slow_devices(rows((1, 1.6), (0, 1.1), (0, 2.2))) == (0, 1.1)
    assert slow_devices(rows((1, 1.6), (0, 2.2)))[1] == 1.0


def test_a_plan_for_chips_knows_neither_saves_nor_the_host() -> None:
    plan = Terms(estimate_s=0.1, memory_bytes=1e9)
    found = replace(PLAN, estimate_s=0.2, device_s=0.19, save_s=9.0, saves_per_step=0.1)
    names(verdict(found, plan), "devices 90.0 ms")
    names(verdict(replace(found, device_s=0.1, host_s=0.1), plan), "host 100.0 ms")
    assert "memory" not in verdict(replace(found, memory_bytes=2e9, is_device_memory=False), plan)


def test_a_plan_for_other_hardware_is_not_compared() -> None:
    here = replace(PLAN, devices=1, device_kind="cpu")
    assert verdict(here, here).startswith("as planned")
    chips = replace(PLAN, devices=1, device_kind="TPU v5", source="one on v5p:1x1x1")
    names(verdict(here, chips), "not comparable v5p:1x1x1 TPU cpu")
    names(verdict(here, replace(here, devices=8)), "not comparable 8 cpu 1")
    assert verdict(replace(chips, source=""), chips).startswith("as planned")
    names(verdict(replace(chips, device_kind="TPU v5 lite"), chips), "not comparable lite")
    h200 = replace(chips, device_kind="NVIDIA H200 141GB HBM3e")
    assert verdict(replace(chips, device_kind="NVIDIA H200"), h200).startswith("as planned")


def test_a_plan_that_was_measured_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan_rows(PLAN, "runs/x")))
    assert read_plan(str(path)) == replace(PLAN, source="runs/x")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "[1]",
        '[{"estimate_s": 0.0}]',
        '[{"estimate_s": 1.0, "data_s": "x"}]',
        '[{"estimate_s": 1}, {}]',
        '[{"estimate_s": 1}, {"estimate_s": 2}]',
        '[{"estimate_s": 1.0, "device_kind": 3}]',
    ],
)
def test_what_is_not_a_plan_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with raises(ConfigError, f"{path} one topology plan --on --json"):
        read_plan(str(path))


def test_bad_words(tiny: Tiny, tmp_path: Path) -> None:
    for words, named in (
        (("--check", str(tmp_path / "none")), f"{tmp_path}/none no run.json"),
        (("--fit", str(tmp_path / "none")), f"{tmp_path}/none no run.json"),
        (("--check", "runs/a", "--json", "o.json"), "--check runs/a --json"),
        (("--check", "runs/a", "--fit", "runs/b"), "--check --fit"),
        (("--check", "runs/a", "--write", "best.py"), "--check runs/a --write"),
        (("--fit", "runs/a", "--host-mb-s", "3"), "--fit runs/a --host-mb-s"),
        (("--exam", "rows.csv", "--limit", "3"), "--exam rows.csv --limit"),
        (("configs/quickstart.py", "model.remat=full", "--exam", "rows.csv"), "--exam rows.csv configs/quickstart.py"),
        (("--plan", "plan.json"), "--plan --check"),
        (("--on", "v5e:2x4"), "needs a config --on v5e:2x4"),
    ):
        refused(launch("plan", *words), named)


def test_a_plan_that_cannot_be_read_is_refused_before_the_run_is_made(tiny: Tiny) -> None:
    refused(tiny.launch("name=planned", "track.plan=none.json"), "track.plan=none.json cannot be read plan --json")
    assert not tiny.directory("planned").exists()


@pytest.mark.slow(25)
def test_a_run_says_what_is_off(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, few = tmp_path / "plan.json", ("train.eval_every=none", "checkpoint.save_every=50", "track.log_every=5")
    assert tiny.launch(*few, "name=sound", "train.steps=60").code == 0
    sound = str(tiny.directory("sound"))
    refused(launch("plan", "--fit", sound), "--fit --json")
    refused(launch("plan", "--check", sound), "--check track.plan --plan")
    assert launch("plan", "--fit", sound, "--json", str(plan)).code == 0
    measured = measure(tiny.directory("sound"))
    assert measured is not None and measured.compiles < 0.5

    monkeypatch.setenv("JAXINFRA_FAIL", "data:0:*:sleep=1.5")  # several are read at a time
    seldom = (*few[:2], "track.log_every=1000")  # the ledger has rows all the same
    ended = tiny.launch(*seldom, "name=slow", "train.steps=102", f"track.plan={plan}")
    assert ended.code == 0, ended
    (line,) = [line for line in ended.out.splitlines() if "plan: " in line]
    names(line, "step 100/102 waiting for data planned")
    monkeypatch.delenv("JAXINFRA_FAIL")
    checked = launch("plan", "--check", str(tiny.directory("slow")))
    assert checked.code == 0 and "waiting for data" in checked.out, checked
