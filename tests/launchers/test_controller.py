"""What a launching machine does when others act on the same run, and when a step of it fails."""

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest

from jaxinfra.errors import ConfigError, JaxinfraError, Preempted, RunInUseError, StorageError
from jaxinfra.launchers.places import controller as module
from jaxinfra.launchers.places.controller import Controller, release_last
from jaxinfra.launchers.places.end_record import ENDED_FILE
from jaxinfra.launchers.places.job import Attempts, Job
from jaxinfra.launchers.places.place import Host, HostState, PlaceOptions
from jaxinfra.launchers.places.ssh_place import SshPlace
from jaxinfra.storage.objects import ObjectStore

HOSTS = (Host(address="a"), Host(address="b"))


@dataclass
class Source:
    """Hosts that exist while `exists`."""

    options: PlaceOptions
    exists: bool = False
    why_lost: str | JaxinfraError = ""

    def current(self) -> Sequence[Host]:
        return HOSTS if self.exists else ()

    def lost(self) -> str:
        if isinstance(self.why_lost, JaxinfraError):
            raise self.why_lost
        return self.why_lost or ("" if self.exists else "deleted")

    def release(self, say: Any) -> None:
        self.exists = False


@dataclass
class Place:
    """A place on paper: hosts end with the codes of `script`, attempt by attempt; None lives until it is stopped."""

    source: Source
    script: list[int | None] = field(default_factory=list)
    fails: JaxinfraError | None = None  # of ship
    hosts: Sequence[Host] = ()
    attempt: int = 0
    state: HostState = field(default_factory=lambda: HostState(attempt=0, state="none"))
    done: list[str] = field(default_factory=list)
    started: str = "runs"
    poll_s: float = 0.0

    def console(self, job: Job, *, lines: str, follow: bool) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["true"], stdout=subprocess.PIPE)

    def prepare(self, job: Job, *, go_on: Any) -> Mapping[str, str]:
        if not go_on():
            raise Preempted("stopped")
        self.source.exists, self.hosts = True, HOSTS
        self.done.append("prepare")
        return {}

    def ship(self, job: Job, attempts: Attempts) -> None:
        if self.fails is not None:
            raise self.fails

    def start(self, job: Job, number: int, *, left_s: float) -> None:
        code = self.script.pop(0)
        self.done.append(f"start {number}")
        self.state = HostState(attempt=number, state="live" if code is None else "ended", code=code)

    def watch(self, job: Job) -> Mapping[Host, HostState]:
        return dict.fromkeys(self.hosts, self.state)

    def stop(self, job: Job, number: int, *, signal: str = "TERM") -> None:
        self.done.append(f"stop {number}")
        self.state = HostState(attempt=number, state="ended", code=75)

    def remove(self) -> None:
        self.done.append("remove")
        self.source.release(None)


@dataclass(frozen=True)
class Lab:
    """A controller of a place on paper."""

    place: Place
    attempts: Attempts
    controller: Controller
    job: Job
    said: list[str]


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    options = PlaceOptions(kind="tpu-vm", create="v6e-8")
    job = Job(location=str(tmp_path), command=[], folder=".", place=options, bundle="b")
    said = list[str]()
    attempts, place = Attempts(files=ObjectStore(tmp_path), location=str(tmp_path)), Place(source=Source(options))
    return Lab(place, attempts, Controller(cast(SshPlace, place), attempts, said.append), job, said)


def run(lab: Lab, *script: int | None) -> int:
    """Starts the run and follows it to its end."""
    lab.place.script = [*script]
    return lab.controller.follow(lab.controller.start(lab.job, 1), 1)


def endless_console(job: Job, *, lines: str, follow: bool) -> subprocess.Popen[bytes]:
    """A host that waits after its run before it deletes itself: until then what follows its console goes on."""
    follows = r"printf 'step 1\nste' && exec sleep 600"
    shows = rf"printf 'step 1\nstep 2\n' | tail -n {lines}"
    shown = follows if follow else shows
    return subprocess.Popen(["sh", "-c", f"echo '--- jaxinfra' && {shown}"], stdout=subprocess.PIPE)


def test_the_console_ends_with_the_run(
    lab: Lab, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No line is lost, doubled or cut, though the host goes on."""
    monkeypatch.setattr(lab.place, "console", endless_console)
    assert run(lab, 0) == 0
    assert capsys.readouterr().out == "step 1\nstep 2\n"


def test_starts_again_by_the_table_and_deletes_at_the_end(lab: Lab) -> None:
    assert run(lab, 75, 76, 0) == 0
    assert [each for each in lab.place.done if each != "prepare"] == ["start 1", "start 2", "start 3", "remove"]


@pytest.mark.parametrize("code", [1, 2, 78, 79, 80, 81, 83, 84])
def test_codes_that_would_come_again_end_it(lab: Lab, code: int) -> None:
    assert run(lab, code) == code
    assert lab.place.done == ["prepare", "start 1", "remove"]


def test_gives_up_a_crash_loop(lab: Lab) -> None:
    assert run(lab, *[76] * 9) == 76
    assert lab.place.done[-2:] == ["start 5", "remove"]


def test_stopped_by_the_user_while_it_waits_to_start_again(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.time, "sleep", lambda seconds: lab.attempts.stop(1))
    with pytest.raises(Preempted):
        run(lab, 76, 0)
    assert "start 2" not in lab.place.done


def test_stopped_by_the_user_before_it_starts(lab: Lab) -> None:
    lab.attempts.stop(1)
    with pytest.raises(Preempted):
        run(lab, 0)
    assert not lab.place.source.exists


def test_what_was_made_goes_if_it_cannot_be_used(lab: Lab) -> None:
    lab.place.fails = ConfigError("host a: full")
    with pytest.raises(ConfigError, match="full"):
        run(lab, 0)
    assert not lab.place.source.exists
    lab.place.fails = StorageError("no answer")  # another machine may do better
    with pytest.raises(StorageError):
        lab.controller.start(lab.job, 2)
    assert lab.place.source.exists and "costs" in lab.said[-1] and "stop" in lab.said[-1]


def test_a_run_that_is_done_makes_nothing_again(lab: Lab) -> None:
    run(lab, 0)
    lab.attempts.files.create(ENDED_FILE.format(attempt=1), b'{"code": 0, "is_over": false}')
    job, number = lab.controller.take_over(lab.job, 1)
    assert number == 1 and lab.controller.follow(job, number) == 0
    assert lab.place.done.count("prepare") == 1 and not lab.place.source.exists


def test_goes_on_with_an_attempt_that_was_claimed_and_not_started(lab: Lab) -> None:
    lab.attempts.claim(1, lab.job)
    lab.place.script = [0]
    assert lab.controller.take_over(lab.job, 1)[1] == 1 and lab.place.done == ["prepare", "start 1"]


def test_goes_on_with_the_next_attempt_after_a_stop(lab: Lab) -> None:
    lab.place.script = [None, 0]
    lab.controller.start(lab.job, 1)
    lab.controller.stop(lab.job, 1)
    assert not lab.place.source.exists
    job, number = lab.controller.take_over(lab.job, 1)
    assert number == 2 and job.first == 2 and lab.place.done[-1] == "start 2"


def test_hours_begin_anew_when_the_user_goes_on(lab: Lab) -> None:
    job = replace(lab.job, place=replace(lab.job.place, max_hours=1e-9))
    lab.place.source.options = job.place
    lab.place.script = [75, 0]
    assert lab.controller.follow(lab.controller.start(job, 1), 1) == 75
    assert "--max-hours" in " ".join(lab.said) and not lab.place.source.exists
    again, number = lab.controller.take_over(job, 1)
    assert number == 2 and again.first == 2


def test_a_cloud_that_does_not_answer_changes_nothing(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOST_EVERY_S", -1.0)
    lab.place.source.why_lost = StorageError("503")
    lab.place.script = [None]
    lab.controller.start(lab.job, 1)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: lab.place.stop(lab.job, 1))
    lab.attempts.stop(1)
    assert lab.controller.follow(lab.job, 1) == 75 and "warning: 503" in lab.said


def test_a_new_start_is_refused_while_the_last_one_lives_or_was_faster(lab: Lab) -> None:
    lab.place.script = [None]
    lab.controller.start(lab.job, 1)
    with pytest.raises(RunInUseError, match="attempt 1 is live on a, b"):
        release_last(cast(SshPlace, lab.place), lab.job, 1, lab.job.place, lab.said.append)
    with pytest.raises(RunInUseError, match="another machine"):
        lab.controller.start(replace(lab.job, bundle="other"), 1, is_new=True)


def test_a_new_start_elsewhere_deletes_what_the_last_one_left(lab: Lab) -> None:
    lab.place.source.exists = True
    elsewhere = replace(lab.job.place, zone="us-east5-a")
    release_last(cast(SshPlace, lab.place), lab.job, 1, elsewhere, lab.said.append)
    assert not lab.place.source.exists


def test_lost_hosts_are_made_again(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOST_EVERY_S", -1.0)
    lab.place.script = [None, 0]
    job = lab.controller.start(lab.job, 1)
    lab.place.source.why_lost = "preempted"
    assert lab.controller.follow(job, 1) == 0
    assert lab.place.done.count("prepare") == 2 and any("preempted" in line for line in lab.said)


def test_an_elastic_run_is_done_with_the_hosts_that_are_left(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    done, lost = HostState(attempt=1, state="ended", code=0), HostState(attempt=1, state="away")
    monkeypatch.setattr(lab.place, "watch", lambda job: dict(zip(HOSTS, (lost, done), strict=True)))
    job = replace(lab.job, command=["--elastic", "1..2"])
    lab.place.script = [None]
    assert lab.controller.follow(lab.controller.start(job, 1), 1) == 0 and "stop 1" not in lab.place.done
