"""Notices of the clouds, from servers that answer as theirs do."""

import json
import threading
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from jaxinfra.errors import ConfigError
from jaxinfra.processes import maintenance
from jaxinfra.processes.peers import Peers
from jaxinfra.track.jsonl import JsonlTracker
from tests.refusals import preempted, raises
from tests.tiny_run import STEPS, Tiny
from tests.tiny_run import tiny as tiny
from tests.tiny_run import tiny_data as tiny_data

GOOGLE, AZURE = "/computeMetadata/v1/instance", "/metadata/scheduledevents?api-version=2020-07-01"
PLANNED, EC2 = f"{GOOGLE}/upcoming-maintenance?alt=json", "/latest/meta-data/spot/instance-action"


class Cloud:
    """A metadata server: answers by path, None for 404 or `missing`. It needs the headers that the real ones need."""

    def __init__(self) -> None:
        self.answers: dict[str, str] = {
            f"{GOOGLE}/preempted": "FALSE",
            f"{GOOGLE}/maintenance-event": "NONE",
            "/latest/api/token": "secret",
            "/metadata/instance/compute/name?api-version=2021-02-01&format=text": "vm_1",
            AZURE: json.dumps({"DocumentIncarnation": 1, "Events": []}),
        }
        self.missing: dict[str, int] = {}  # status in place of 404 by path
        self.asked = threading.Semaphore(0)
        cloud = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                needed = {"/comp": ("Metadata-Flavor", "Google"), "/meta": ("Metadata", "true")}
                name, value = needed.get(self.path[:5], ("X-aws-ec2-metadata-token", "secret"))
                answer = cloud.answers.get(self.path) if self.headers[name] == value else None
                self._answer(answer)

            def do_PUT(self) -> None:
                self._answer(cloud.answers[self.path] if self.headers["X-aws-ec2-metadata-token-ttl-seconds"] else None)

            def _answer(self, answer: str | None) -> None:
                self.send_response(cloud.missing.get(self.path, 404) if answer is None else 200)
                self.end_headers()
                self.wfile.write((answer or "").encode())
                cloud.asked.release()

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.server.server_port}"

    def environment(self, name: str) -> dict[str, str]:
        url = f"http://{self.address}"
        addresses = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": url, "AZURE_METADATA_ENDPOINT": url}
        return {"JAXINFRA_METADATA": name, "GCE_METADATA_HOST": self.address, **addresses}


@pytest.fixture
def cloud() -> Iterator[Cloud]:
    made = Cloud()
    thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


def event(kind: str, machine: str) -> str:
    return json.dumps({"Events": [{"EventType": kind, "Resources": [machine], "NotBefore": "Mon, 19 Sep 2026"}]})


def planned(minutes: float, status: str = "PENDING") -> str:
    """Planned maintenance that begins in some minutes, as Google Cloud tells of it."""
    start = datetime.now(UTC) + timedelta(minutes=minutes)
    times = {"window_start_time": start.isoformat(), "window_end_time": (start + timedelta(hours=4)).isoformat()}
    return json.dumps({**times, "can_reschedule": "TRUE", "type": "SCHEDULED", "maintenance_status": status})


@pytest.mark.parametrize(
    ("name", "path", "quiet", "answer", "words"),
    [
        ("google", f"{GOOGLE}/preempted", "FALSE", "TRUE", "spot"),
        (
            "google",
            f"{GOOGLE}/maintenance-event",
            "MIGRATE_ON_HOST_MAINTENANCE",
            "TERMINATE_ON_HOST_MAINTENANCE",
            "host",
        ),
        ("google", PLANNED, planned(60.0), planned(4.0), "planned maintenance begins at"),
        ("google", PLANNED, planned(-2.0), planned(-2.0, "ONGOING"), "planned maintenance ongoing"),
        ("google", PLANNED, '"NONE"', planned(4.0).replace("window_start_time", "windowStartTime"), "begins at"),
        ("google", PLANNED, planned(4.0, "UNKNOWN"), planned(4.0), "begins at"),
        ("aws", EC2, None, json.dumps({"action": "terminate", "time": "2026-09-18T08:22:00Z"}), "terminate at 2026"),
        ("azure", AZURE, event("Preempt", "vm_2"), event("Preempt", "vm_1"), "Preempt, not before Mon"),
        ("azure", AZURE, event("Freeze", "vm_1"), event("Reboot", "vm_1"), "Reboot"),
    ],
)
def test_a_notice_is_heard_once(cloud: Cloud, name: str, path: str, quiet: str, answer: str, words: str) -> None:
    heard, arrived = [], threading.Event()

    def hear(notice: str) -> None:
        heard.append(notice)
        arrived.set()

    if quiet is not None:
        cloud.answers[path] = quiet
    with maintenance.listen(cloud.environment(name), hear, poll_s=0.01):
        for _ in range(8):
            assert cloud.asked.acquire(timeout=600)
        assert not heard
        cloud.answers[path] = answer
        assert arrived.wait(600)
    assert len(heard) == 1 and all(word in heard[0] for word in words.split())


def test_what_is_not_planned_is_no_warning(cloud: Cloud, caplog: pytest.LogCaptureFixture) -> None:
    cloud.missing[PLANNED] = 503
    heard = list[str]()
    with maintenance.listen(cloud.environment("google"), heard.append, poll_s=0.001):
        for _ in range(30):
            assert cloud.asked.acquire(timeout=600)
    assert not heard and not caplog.messages


def test_a_start_within_planned_maintenance_goes_on(cloud: Cloud) -> None:
    """The start before it has saved; another notice in the same minutes would end each start."""
    cloud.answers[PLANNED] = planned(3.0)
    heard = list[str]()
    with maintenance.listen(cloud.environment("google"), heard.append, poll_s=0.001):
        for _ in range(30):
            assert cloud.asked.acquire(timeout=600)
    assert not heard


def test_a_server_that_is_away_costs_a_warning(cloud: Cloud, caplog: pytest.LogCaptureFixture) -> None:
    environment = cloud.environment("google") | {"GCE_METADATA_HOST": "127.0.0.1:9"}
    with maintenance.listen(environment, lambda notice: None, poll_s=0.001):
        for _ in range(1000):
            if caplog.messages:
                break
            threading.Event().wait(0.01)
    assert len(caplog.messages) == 1 and "not heard" in caplog.messages[0]


@pytest.mark.parametrize(
    ("file", "text", "cloud_name"),
    [
        ("product_name", "Google Compute Engine\n", "google"),
        ("sys_vendor", "Amazon EC2\n", "aws"),
        ("chassis_asset_tag", "7783-7084-3265-9085-8269-3286-77\n", "azure"),
        ("product_name", "KVM\n", None),
    ],
)
def test_the_firmware_names_the_cloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, text: str, cloud_name: str | None
) -> None:
    monkeypatch.setattr(maintenance, "_FIRMWARE", tmp_path)
    (tmp_path / file).write_text(text)
    assert maintenance._cloud_of_firmware() == cloud_name


def test_an_unknown_cloud_is_refused() -> None:
    expected = raises(ConfigError, "JAXINFRA_METADATA=gcp: google, aws, azure off")
    with expected, maintenance.listen({"JAXINFRA_METADATA": "gcp"}, print):
        pass


def test_a_run_saves_and_stops(tiny: Tiny, cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    log, request, asked = JsonlTracker.log, Peers.request, threading.Event()

    def ask(self: Peers, *arguments: Any) -> None:
        request(self, *arguments)
        asked.set()

    def log_late(self: JsonlTracker, step: int, metrics: Mapping[str, float]) -> None:
        log(self, step, metrics)
        if step == 3 and "loss" in metrics:
            cloud.answers[f"{GOOGLE}/preempted"] = "TRUE"
            assert asked.wait(600)

    monkeypatch.setattr(Peers, "request", ask)
    monkeypatch.setattr(JsonlTracker, "log", log_late)
    monkeypatch.setitem(maintenance.listen.__wrapped__.__kwdefaults__, "poll_s", 0.01)
    for name, value in cloud.environment("google").items():
        monkeypatch.setenv(name, value)
    stopped = tiny.launch("track.console=off")
    preempted(stopped, f"{tiny.directory()}: notice of Google Cloud spot machine step of {STEPS}, saved")
    assert max(int(path.name) for path in (tiny.directory() / "checkpoints").iterdir()) < STEPS
