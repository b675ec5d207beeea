"""Hosts as threads that meet in a folder: who trains in the next round, who waits, and who decides."""

import threading
import time
from pathlib import Path
from typing import Self

import pytest

from jaxinfra.errors import PeerLostError, RunInUseError
from jaxinfra.launchers import rendezvous
from jaxinfra.launchers.rendezvous import Rendezvous, RoundWatch
from jaxinfra.launchers.rounds import Bounds, Host, Round
from tests.launchers.test_launcher import until
from tests.servers.bucket import emulated_bucket

_BEAT_S = 0.02


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of life come often; a busy machine may be late with some."""
    monkeypatch.setattr(rendezvous, "_BEAT_S", _BEAT_S)
    monkeypatch.setattr(rendezvous, "_DEAD_BEATS", 150)


class Supervisor:
    """A thread that meets the others, as a supervisor does before each start."""

    def __init__(self, folder: Path | str, index: int, bounds: Bounds) -> None:
        host = Host(index=index, name=f"node{index}", address=f"node{index}:8476")
        self.rendezvous = Rendezvous(str(folder), host, bounds)
        self.found: Round | Exception | None = None
        self.said: list[str] = []
        self._is_stopped = False
        self._thread = threading.Thread()

    def meet(self) -> Self:
        """Begins to meet the others."""

        def run() -> None:
            try:
                self.found = self.rendezvous.meet(is_stopped=lambda: self._is_stopped, say=self.said.append)
            except (PeerLostError, RunInUseError) as error:
                self.found = error

        self.found, self._is_stopped = None, False
        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Stops to meet, with a word to the others."""
        self._is_stopped = True
        self._thread.join()

    def ended(self) -> Round | Exception | None:
        """Waits until it has met the others."""
        until(lambda: not self._thread.is_alive())
        return self.found


def bounds(
    most: int, *numbers: int, least: int = 1, wait_s: float = 0.2, silence_s: float = 30.0, together: int = 1
) -> Bounds:
    """A run that trains on these numbers of hosts."""
    overrides = {number: [f"mesh.replica={number}"] for number in numbers or range(1, most + 1)}
    return Bounds(
        least=least, most=most, overrides=overrides, wait_s=wait_s, join_s=60.0, silence_s=silence_s, together=together
    )


def supervisors(folder: Path, limits: Bounds) -> list[Supervisor]:
    """All of them, before they meet."""
    return [Supervisor(folder, index, limits) for index in range(limits.most)]


def met(*those: Supervisor) -> Round:
    """Lets hosts meet, and returns what all have found."""
    for each in those:
        each.meet()
    found = [each.ended() for each in those]
    assert isinstance(found[0], Round) and all(each == found[0] for each in found), found
    return found[0]


def test_all_hosts_are_waited_for_at_the_first_start(tmp_path: Path) -> None:
    first, second, third = supervisors(tmp_path, bounds(3, wait_s=0.0))
    first.meet()
    third.meet()
    time.sleep(20 * _BEAT_S)
    assert first.found is third.found is None and first.said[-1] == "waiting for host 1"
    second.meet()
    decided = [each.ended() for each in (first, second, third)]
    assert decided[0] == decided[1] == decided[2] and isinstance(decided[0], Round)
    assert decided[0].indices == [0, 1, 2] and decided[0].hosts[0].address == "node0:8476"
    assert str(decided[0]) == "round 1: 3 hosts" and decided[0].overrides == ["mesh.replica=3"]


def test_a_host_that_does_not_come_back_is_left_out_and_joins_again(tmp_path: Path) -> None:
    first, second, third = supervisors(tmp_path, bounds(3))
    met(first, second, third)
    shrunk = met(second, third)  # the first host is lost, which was process 0
    assert (shrunk.indices, shrunk.absent, shrunk.overrides) == ([1, 2], [0], ["mesh.replica=2"])
    assert str(shrunk) == "round 2: 2 hosts, without 0"

    again = Supervisor(tmp_path, 0, bounds(3)).meet()  # a new supervisor, which knows nothing
    with RoundWatch(second.rendezvous) as watch, RoundWatch(third.rendezvous) as other:
        until(lambda: watch.can_grow)
        assert not (watch.is_over or other.is_over or other.can_grow)  # the supervisor of process 0 alone says so
        assert again.found is None
    grown = met(second, third)
    assert again.ended() == grown and (grown.number, grown.indices, grown.absent) == (3, [0, 1, 2], [])


def test_hosts_beyond_what_the_run_can_be_divided_among_are_spares(tmp_path: Path) -> None:
    hosts = supervisors(tmp_path, bounds(4, 4, 2, 1))
    assert met(*hosts).indices == [0, 1, 2, 3]
    first, second, spare, lost = hosts
    spare.meet()
    shrunk = met(first, second)
    assert (shrunk.indices, shrunk.spares, shrunk.absent) == ([0, 1], [2], [3])
    until(lambda: "needed" in "".join(spare.said))
    assert "round 2: 2 hosts, without 3, spare 2; this host waits until it is needed" in spare.said
    with RoundWatch(first.rendezvous) as watch:
        time.sleep(20 * _BEAT_S)
        assert not watch.can_grow  # three hosts train as two do
    taken = met(second)  # the other host is lost, and the spare takes its place
    assert (taken.indices, taken.absent) == ([1, 2], [0, 3]) and spare.ended() == taken
    lost.meet()
    assert met(second, spare).indices == [1, 2]
    second.rendezvous.end(0)
    assert (found := lost.ended()) is not None and isinstance(found, Round) and found.code == 0


def test_a_host_of_the_round_that_comes_anew_ends_it(tmp_path: Path) -> None:
    """Its process is gone with its supervisor, but the others may wait for it in a collective."""
    first, second = supervisors(tmp_path, bounds(2, wait_s=30.0))
    met(first, second)
    again = Supervisor(tmp_path, 1, bounds(2, wait_s=30.0)).meet()
    with RoundWatch(first.rendezvous) as watch:
        until(lambda: watch.is_over)  # and the first one says that it is leaving
        time.sleep(20 * _BEAT_S)
        assert again.found is None
    assert met(first) == again.ended()


def test_a_host_that_waits_already_waits_for_those_that_leave_a_round(tmp_path: Path) -> None:
    """The smallest index decides, and it may have waited for long before the round is over."""
    _, second, third = (hosts := supervisors(tmp_path, bounds(3, wait_s=1.0)))
    met(*hosts)
    met(second, third)
    again = Supervisor(tmp_path, 0, bounds(3, wait_s=1.0)).meet()
    with RoundWatch(second.rendezvous), RoundWatch(third.rendezvous):
        time.sleep(1.5)
    second.meet()
    time.sleep(0.3)  # the third one ends its processes
    third.meet()
    assert again.ended() == second.ended() == third.ended()
    assert isinstance(again.found, Round) and again.found.indices == [0, 1, 2]


def test_a_spare_takes_over_only_when_all_hosts_that_train_are_silent(tmp_path: Path) -> None:
    """It has trained in an earlier round, and has waited for longer than others get to come."""
    limits = bounds(3, 2, 1, wait_s=0.1, silence_s=5.0)
    first, second, spare = supervisors(tmp_path, limits)
    spare.meet()
    met(first, second)
    with RoundWatch(first.rendezvous) as watch, RoundWatch(second.rendezvous):
        watch.has_stepped = True
        time.sleep(2.0)
        assert spare.found is None and "round 1 trains" in spare.said[-1] and not watch.is_over
    assert met(first, second).number == 2
    assert spare.found is None
    taken = spare.ended()  # nobody watches round 2
    assert isinstance(taken, Round) and (taken.number, taken.indices) == (3, [2])


def test_what_a_job_has_left_does_not_shrink_the_next_one(tmp_path: Path) -> None:
    first, second = supervisors(tmp_path, bounds(2))
    met(first, second)
    for each in (first, second):  # stopped by their scheduler
        with RoundWatch(each.rendezvous):
            each.rendezvous.leave()
    first, second = supervisors(tmp_path, bounds(2))
    first.meet()
    time.sleep(2.0)
    assert first.found is None
    assert met(second) == first.ended()


def test_a_second_supervisor_of_a_host_is_refused(tmp_path: Path) -> None:
    first, second = supervisors(tmp_path, bounds(2))
    met(first, second)
    with RoundWatch(first.rendezvous) as watch, RoundWatch(second.rendezvous):
        time.sleep(10 * _BEAT_S)
        twin = Supervisor(tmp_path, 1, bounds(2)).meet()
        assert isinstance(error := twin.ended(), RunInUseError) and "host 1" in str(error)
        time.sleep(10 * _BEAT_S)
        assert not watch.is_over
    second.meet()
    time.sleep(10 * _BEAT_S)
    assert isinstance(Supervisor(tmp_path, 1, bounds(2)).meet().ended(), RunInUseError)
    assert met(first) == second.ended()


def test_hosts_meet_in_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_BUCKET_BEAT_S", _BEAT_S)
    with emulated_bucket() as bucket, monkeypatch.context() as context:
        for name, value in bucket.environment.items():
            context.setenv(name, value)
        url = f"{bucket.url}/elastic"
        hosts = [Supervisor(url, index, bounds(3)) for index in range(3)]
        assert met(*hosts).indices == [0, 1, 2]
        assert met(*hosts[1:]).indices == [1, 2]
        hosts[1].rendezvous.end(0)
        assert (found := hosts[2].meet().ended()) is not None and isinstance(found, Round) and found.code == 0


def test_nobody_waits_for_a_host_that_was_stopped(tmp_path: Path) -> None:
    first, second = supervisors(tmp_path, bounds(2, wait_s=3600.0))
    met(first, second)
    with RoundWatch(first.rendezvous) as watch:
        watch.has_stepped = True
        time.sleep(10 * _BEAT_S)
        second.rendezvous.leave()
        time.sleep(10 * _BEAT_S)
        assert not watch.is_over  # its processes end by themselves
    assert met(first).absent == [1]


def test_too_few_hosts_give_up(tmp_path: Path) -> None:
    limits = Bounds(least=2, most=2, overrides={2: []}, wait_s=0.1, join_s=0.1)
    found = Supervisor(tmp_path, 1, limits).meet().ended()
    assert isinstance(found, PeerLostError) and "1 of at least 2 hosts" in str(found)


def test_whole_slices_train_or_none(tmp_path: Path) -> None:
    limits = bounds(6, 6, 4, 2, together=2)
    assert limits.chosen([0, 1, 2, 4, 5]) == [0, 1, 4, 5]
    assert limits.chosen([1, 2, 3]) == [2, 3]
    assert limits.chosen([1, 2, 5]) == []
    assert bounds(4, 4, 3, least=3).chosen([0, 1]) == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"number": 1}', b'{"host": {"index": "x"}}'])
def test_files_of_others_are_no_hosts(tmp_path: Path, content: bytes) -> None:
    folder = tmp_path / rendezvous.FOLDER
    folder.mkdir()
    for name in ("ready-000001-1.json", "ready-000001-x.json", "running-000000-1.json", "other"):
        (folder / name).write_bytes(content)
    first, second = supervisors(tmp_path, bounds(2))
    first.meet()
    time.sleep(10 * _BEAT_S)
    assert first.found is None
    assert met(second) == first.ended()
