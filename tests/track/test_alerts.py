"""The alerts and the dashboard of docs/prometheus: by promtool, and in a real Prometheus that scrapes real runs."""

import json
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT
from tests.servers.guard import free_ports
from tests.servers.prometheus import Server, needs_prometheus, prometheus
from tests.several import several
from tests.tiny_run import Tiny, ended
from tests.tiny_run import tiny as tiny
from tests.tiny_run import tiny_data as tiny_data
from tests.train.until import until

RULES, DASHBOARD = ROOT / "docs/prometheus/alerts.yaml", ROOT / "docs/prometheus/dashboard.json"
ALERTS = {"NoProgress", "LowGoodput", "Straggler", "SaveStall", "LossNotFinite"}
SHORTER = (
    ("for: 15m", "for: 1s"),
    ("for: 10m", "for: 1s"),
    ("> 900\n", "> 8\n"),
    ("900)", "8)"),
    ("> 3600", "> 10"),
    ("[1h]", "[10s]"),
)
"""Shorter times before an alert, in place of those that a test cannot wait for."""


def rules() -> list[dict[str, Any]]:
    return yaml.safe_load(RULES.read_text())["groups"][0]["rules"]


def test_each_alert_says_what_to_do() -> None:
    assert {each["alert"] for each in rules()} == {f"Jaxinfra{name}" for name in ALERTS}
    for each in rules():
        assert each["annotations"]["summary"].strip().startswith("{{ $labels.run }}")
        page, anchor = re.search(r"\((docs/\w+\.md)#([a-z-]+)\)", each["annotations"]["runbook"]).groups()
        titles = re.findall("^##+ (.*)$", (ROOT / page).read_text(), re.MULTILINE)
        assert anchor in {re.sub("[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}


def fires(name: str, series: dict[str, str], *alerts: str, at: str = "30m") -> dict[str, Any]:
    """A test of promtool: the alerts of the run "story" after some time, with a sample of each series a minute."""
    inputs = []
    for each, values in series.items():
        metric, _, labels = each.partition("{")
        inputs.append({"series": f'jaxinfra_{metric}{{run="story",{labels or "}"}', "values": values})
    fire = [{"labels": f'{{alertname="Jaxinfra{each}"}}', "value": 1} for each in alerts]
    expected = {"expr": 'sum by (alertname) (ALERTS{alertstate="firing"})', "eval_time": at, "exp_samples": fire}
    return {"name": name, "interval": "1m", "input_series": inputs, "promql_expr_test": [expected]}


SOUND = {
    "progress_timestamp_seconds": "0+60x480",
    "start_timestamp_seconds": "0x480",
    "save_timestamp_seconds": "0+60x480",
    "save_interval_seconds": "60x480",
    'spent_seconds{on="step"}': "0+55x480",
    'spent_seconds{on="init"}': "0+5x480",
    "perf_step_time_s": "1x480",
    "perf_slowest_process": "2x480",
    "perf_slowest_process_excess_s": "0.1x480",
    "train_loss": "3x480",
    "skipped_steps_total": "0x480",
}
HANGS = {"progress_timestamp_seconds": "0+60x60 3600x420"}
GONE = {each: f"{values.split('x')[0]}x60 stale" for each, values in SOUND.items()}
CASES = [
    fires("sound", SOUND, at="3h"),
    fires("hangs", {**SOUND, **HANGS}, "NoProgress", at="3h"),
    fires("was killed", GONE, "NoProgress", at="3h"),
    fires("has finished", {**GONE, "end_timestamp_seconds": "_x59 3600 stale"}, at="3h"),
    fires(
        "starts again and again",
        {**SOUND, 'spent_seconds{on="step"}': "0x480", 'spent_seconds{on="init"}': "0+60x480"},
        "LowGoodput",
        at="3h",
    ),
    fires("has lost its time long ago", {**SOUND, 'spent_seconds{on="down"}': "9000x480"}, at="3h"),
    fires("a slow host", {**SOUND, "perf_slowest_process_excess_s": "0.2x480"}, "Straggler"),
    fires("slow devices", {**SOUND, "perf_slowest_devices_slowdown": "1.4x480"}, "Straggler"),
    fires("a measurement alone", {**SOUND, "perf_slowest_devices_slowdown": "1x27 1.4 1x100"}, at="28m"),
    fires("no save", {**SOUND, "save_timestamp_seconds": "0x480"}, "SaveStall"),
    fires("saves rarely", {**SOUND, "save_timestamp_seconds": "0x480", "save_interval_seconds": "1800x480"}),
    fires("never saves", {each: values for each, values in SOUND.items() if "save" not in each}, "SaveStall", at="7h"),
    fires("a step that was skipped", {**SOUND, "skipped_steps_total": "0x25 1x100"}, "LossNotFinite"),
    fires("NaN", {**SOUND, "train_loss": "NaN " * 31}, "LossNotFinite"),
    fires("infinity", {**SOUND, "train_loss": "Inf " * 31}, "LossNotFinite"),
    fires("ends with NaN", {**GONE, 'failed{error="NonFiniteError"}': "_x59 1 stale"}, "LossNotFinite", at="62m"),
]


def slow_host(run: str) -> dict[str, Any]:
    """A test of promtool: what the alert says of a run that waits for the host of its process 2."""
    (rule,) = (each for each in rules() if each["alert"] == "JaxinfraStraggler")
    series = {"perf_slowest_process": "2x480", "perf_slowest_process_excess_s": "0.2x480", "perf_step_time_s": "1x480"}
    said = {
        "summary": f"{run}: all wait for the host of process 2 ",
        "runbook": rule["annotations"]["runbook"],
    }
    labels = {"run": run, **rule["labels"]}
    case = fires("a slow host is named", series)
    for each in case["input_series"]:
        each["series"] = f"{each['series'].partition('{')[0]}{{run={json.dumps(run)}}}"
    alert = {
        "eval_time": "30m",
        "alertname": rule["alert"],
        "exp_alerts": [{"exp_labels": labels, "exp_annotations": said}],
    }
    return {"interval": "1m", "input_series": case["input_series"], "alert_rule_test": [alert]}


@needs_prometheus
def test_promtool_finds_the_rules_right(tmp_path: Path) -> None:
    subprocess.run(["promtool", "check", "rules", RULES], check=True)
    tests = tmp_path / "tests.yaml"
    tests.write_text(
        yaml.safe_dump(
            {
                "rule_files": [str(RULES)],
                "evaluation_interval": "1m",
                "tests": [*CASES, *map(slow_host, ("story", 'it\'s "odd"'))],
            }
        )
    )
    ended = subprocess.run(["promtool", "test", "rules", tests], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@needs_prometheus
@pytest.mark.slow(60)
def test_every_alert_fires_and_every_panel_has_data(tiny: Tiny, tmp_path: Path) -> None:
    """Process 1 of a run is slow, its saves stall it, and one hangs; another run ends with a loss that is NaN."""
    text = RULES.read_text()
    for old, new in SHORTER:
        assert old in text, old
        text = text.replace(old, new)
    (tmp_path / "alerts.yaml").write_text(text)
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps([{"estimate_s": 0.1, "joules": 1e6, "devices": 2}]))
    before = "def config() -> Run:"
    config = str(tiny.edited(before, f"from tests.track import fake_nvml\n\nfake_nvml.install(1e6)\n\n\n{before}"))
    ports = free_ports(2)
    fleet, diverges = (
        (f"name={name}", "train.steps=100000", f"track.prometheus.port={port}", "track.prometheus.address=127.0.0.1")
        for name, port in zip(("fleet", "diverges"), ports, strict=True)
    )
    measured = ("track.energy=nvml", f"track.plan={plan}")
    faults = {"JAXINFRA_FAIL": "step:1:*:sleep=0.2,save.copy:0:*:sleep=1,save.write:0:30:sleep=3600"}
    with (
        prometheus(tmp_path, tmp_path / "alerts.yaml", ports) as server,
        several(config, *fleet, *measured, count=2, devices=1, env=faults) as processes,
    ):
        for alert in ("Straggler", "LowGoodput"):
            until_fires(server, alert, "fleet", *processes)
        assert "host of process 1" in server.firing()["JaxinfraStraggler", "fleet"]["summary"]
        targets = [target for panel in json.loads(DASHBOARD.read_text())["panels"] for target in panel["targets"]]
        for query in [target["expr"].replace("$run", ".*") for target in targets]:
            until_found(lambda query=query: server.query(query), *processes)
        until_fires(server, "SaveStall", "fleet", *processes)
        late = {"JAXINFRA_FAIL": "step:0:1:sleep=4"}  # so that Prometheus knows the run before it ends
        with several(str(tiny.config), *diverges, "optim.peak_lr=1e30", count=1, devices=1, env=late) as (process,):
            assert "is nan" in ended(process).err
        for alert in ("LossNotFinite", "NoProgress"):
            until_fires(server, alert, "diverges")


def until_fires(server: Server, alert: str, run: str, *processes: subprocess.Popen) -> None:
    until_found(lambda: (f"Jaxinfra{alert}", run) in server.firing(), *processes)


def until_found(condition: Callable[[], object], *processes: subprocess.Popen) -> None:
    """Asks twice a second."""
    until(lambda: condition() or time.sleep(0.5), *processes)
