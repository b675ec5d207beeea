"""A lease has one owner, on a disk and in a bucket; one that has lost it notices."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path

import pytest

from jaxinfra.errors import RunInUseError
from jaxinfra.storage import lease as lease_module
from jaxinfra.storage.lease import Lease, Owner, current_owner, hold
from jaxinfra.storage.location import is_remote
from jaxinfra.storage.objects import ObjectStore
from tests.refusals import names, raises
from tests.servers.fixtures import Server

EXPIRY_S = 1.0
QUICK = {"beat_s": 0.1, "expiry_s": EXPIRY_S}


@pytest.fixture(params=["disk", "s3", "gcs"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path)
    server: Server = request.getfixturevalue(request.param)
    return server.new_url()


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Owners seem to be on other hosts."""
    monkeypatch.setattr(lease_module, "_process_identity", lambda pid: "")


def test_one_owner_after_another(place: str) -> None:
    tokens = []
    for _ in range(3):
        with hold(place) as lease:
            tokens.append(lease.token)
            lease.check_now()
            owner = current_owner(place)
            assert owner is not None and owner.pid == os.getpid()
        assert current_owner(place) is None
    assert tokens == [1, 2, 3]


def test_a_living_owner_is_named(place: str) -> None:
    with hold(place), raises(RunInUseError, f"{place} process {os.getpid()}"), hold(place):
        pass


def test_a_living_owner_on_another_host_is_seen_by_its_beats(place: str, elsewhere: None) -> None:
    with hold(place, beat_s=0.1), raises(RunInUseError, f"{place} process {os.getpid()}"), hold(place, expiry_s=600.0):
        pass


def test_a_dead_owner_on_another_host_loses_the_lease(
    place: str, elsewhere: None, caplog: pytest.LogCaptureFixture
) -> None:
    with hold(place, beat_s=1000) as first:  # as if it was cut off: no beats
        start_s = time.monotonic()
        with caplog.at_level(logging.WARNING), hold(place, **QUICK) as second:
            assert time.monotonic() - start_s >= EXPIRY_S
            assert second.token == first.token + 1
            names(caplog.messages[0], f"{place} held by process {os.getpid()}")
            for check in (first.check_now, first.check):
                with raises(RunInUseError, f"{place} taken over"):
                    check()
    assert current_owner(place) is None


def test_beats_notice_the_loss(place: str, elsewhere: None) -> None:
    with hold(place, beat_s=3 * EXPIRY_S) as first, hold(place, **QUICK):
        deadline_s = time.monotonic() + 600
        while not _is_lost(first):
            assert time.monotonic() < deadline_s
            time.sleep(0.05)


def _is_lost(lease: Lease) -> bool:
    try:
        lease.check()
    except RunInUseError:
        return True
    return False


CHILD = """
import sys, time
from jaxinfra.storage.lease import hold
with hold(sys.argv[1]):
    print("held", flush=True)
    time.sleep(1000)
"""


def test_a_killed_owner_on_this_host_loses_the_lease_at_once(place: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", CHILD, place], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    with raises(RunInUseError, f"{place} process {child.pid}"), hold(place):
        pass
    child.send_signal(signal.SIGSTOP)  # a stopped one lives
    with raises(RunInUseError, f"{place} process {child.pid}"), hold(place):
        pass
    child.kill()
    child.communicate()
    start_s, expiry_s = time.monotonic(), 600.0
    with hold(place, expiry_s=expiry_s) as lease:
        assert lease.token == 2
        assert time.monotonic() - start_s < expiry_s, "it has waited for the expiry"


def test_many_at_once(tmp_path: Path) -> None:
    """One of several processes that start together gets it."""
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for _ in range(6)
    ]
    try:
        deadline_s = time.monotonic() + 600
        while sum(child.poll() is None for child in children) > 1:
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        (holder,) = (child for child in children if child.poll() is None)
        owner = current_owner(tmp_path)
        assert owner is not None and owner.pid == holder.pid
    finally:
        for child in children:
            child.kill()
            child.wait()


def test_a_damaged_file_is_waited_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its owner may live: then it writes the file again."""
    (tmp_path / "lease").mkdir()
    (tmp_path / "lease" / "00000007.json").write_text("{")
    assert current_owner(tmp_path) is None
    with caplog.at_level(logging.WARNING), hold(tmp_path, **QUICK) as lease:
        assert lease.token == 8
        names(caplog.messages[0], f"{tmp_path} damaged")
        (tmp_path / "lease" / "00000008.json").write_text("{")
        with raises(RunInUseError, f"{tmp_path}"), hold(tmp_path, expiry_s=600.0):
            pass


OWNER = asdict(Owner(host="node1", pid=2**31 - 1, identity="", since="2026-11-29T00:00:00+00:00", renewed="2026-11-29"))
ODD = (
    *(b"", b"\0" * 64, bytes(range(256)), b"7", b"9" * 5000, b'"x"', b"[]", b"[1, 2]", b"null", b"[" * 100_000, b"{}"),
    *(
        json.dumps({name: value for name, value in OWNER.items() if name != missing}).encode()
        for missing in OWNER.keys() - {"round"}  # which an earlier version does not write
    ),
    *(
        json.dumps(OWNER | {name: value}).encode()
        for name in OWNER
        for value in (None, [1], "x" * 1000, "\x1b[2J\n", 10**400)
    ),
    json.dumps(OWNER | {"renewed": "0001-01-01"}).encode(),
)
"""Contents of the file of a lease after damage, or after another program has written it."""


def test_a_file_of_an_odd_shape_is_waited_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    places = [tmp_path / str(number) for number in range(len(ODD) + 3)]
    for place, content in zip_longest(places, ODD, fillvalue=None):
        assert place is not None
        (place / "lease").mkdir(parents=True)
        if content is not None:
            (place / "lease" / "00000007.json").write_bytes(content)
    folder, pipe, link = (place / "lease" / "00000007.json" for place in places[-3:])
    folder.mkdir()
    os.mkfifo(pipe)
    link.symlink_to("nowhere")
    for place in places:
        caplog.clear()
        assert current_owner(place) is None
        with hold(place, beat_s=1000, expiry_s=0.002) as lease:
            assert lease.token == 8
        names(caplog.messages[0], f"{place}: held by damaged")
        left = {"00000007.json"} if place == places[-3] else set[str]()
        assert {path.name for path in (place / "lease").iterdir()} == {"00000008.json"} | left
        with hold(place) as lease:
            assert lease.token == 9


def test_an_owner_of_an_earlier_round_is_not_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The hosts of an elastic run have agreed to go on without it; an owner outside of such runs is waited for."""
    (tmp_path / "lease").mkdir()
    file, others = tmp_path / "lease" / "00000007.json", OWNER | {"identity": "another/host/1"}
    file.write_bytes(json.dumps(others | {"round": 2}).encode())
    with hold(tmp_path, beat_s=1000, round_number=3) as lease:
        assert lease.token == 8 and not caplog.messages
    for owner, own in ((2, 2), (3, 2), (2, 0), (0, 2)):
        caplog.clear()
        (tmp_path / "lease" / "00000009.json").write_bytes(json.dumps(others | {"round": owner}).encode())
        with hold(tmp_path, beat_s=1000, expiry_s=0.002, round_number=own) as lease:
            names(caplog.messages[0], "held by process on node1")
        (tmp_path / "lease" / f"{lease.token:08d}.json").unlink()


def test_an_owner_of_a_later_version_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "lease").mkdir()
    (tmp_path / "lease" / "00000007.json").write_text(json.dumps(OWNER | {"new": 1}))
    with hold(tmp_path, beat_s=1000, expiry_s=0.002):
        names(caplog.messages[0], f"{tmp_path}: held by process {OWNER['pid']} node1")


def test_names_that_are_no_files_of_a_lease_are_left_alone(tmp_path: Path) -> None:
    strays = {"7.json", "000000007.json", "00000007.json.bak", "00000007", ".00000007.json", "x.json", "00000000.json"}
    (tmp_path / "lease").mkdir()
    for name in strays:
        (tmp_path / "lease" / name).write_text("{}")
    with hold(tmp_path) as lease:
        assert lease.token == 1
    with hold(tmp_path) as lease:
        assert lease.token == 2
    assert {path.name for path in (tmp_path / "lease").iterdir()} == strays | {"00000002.json"}


def test_a_kill_in_a_beat_leaves_nothing_for_good(tmp_path: Path) -> None:
    die = "import os; os.replace = lambda *_: os.kill(os.getpid(), 9)\n"
    beat = CHILD.replace("hold(sys.argv[1])", "hold(sys.argv[1], beat_s=0.01)")
    child = subprocess.run([sys.executable, "-c", die + beat, str(tmp_path)], capture_output=True, check=False)
    assert child.returncode == -signal.SIGKILL
    left = {path.name for path in (tmp_path / "lease").iterdir()}
    assert len(left) == 2 and "00000001.json" in left
    with hold(tmp_path):
        assert {path.name for path in (tmp_path / "lease").iterdir()} == {"00000002.json"}


def test_a_deleted_lease_is_lost(place: str, elsewhere: None, tmp_path: Path) -> None:
    """Else there are two owners after somebody has deleted it: the next one may have any token."""
    for _ in range(2):
        with hold(place):
            pass
    with hold(place, beat_s=1000) as first:
        if is_remote(place):
            ObjectStore(place).delete_below("lease")
        else:
            shutil.rmtree(tmp_path / "lease")
        with hold(place, **QUICK) as second:
            assert second.token < first.token
            with raises(RunInUseError, f"{place} 00000003.json deleted"):
                first.check_now()
            second.check_now()


def test_tokens_go_on_where_the_lease_was_not_copied(tmp_path: Path) -> None:
    with hold(tmp_path, after=6) as lease:
        assert lease.token == 7
    with hold(tmp_path, after=6) as lease:
        assert lease.token == 8


def test_a_release_that_failed_lets_this_process_take_the_lease_again(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("JAXINFRA_STORAGE_RETRY_S", "0.2")
    place = server.new_url()
    with caplog.at_level(logging.WARNING), hold(place, beat_s=1000):
        server.faults.down = True
    names(caplog.messages[0], f"{place}/lease")
    server.faults.down = False
    with hold(place) as lease:
        assert lease.token == 2


def test_any_error_of_the_beats_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the process trains on although its lease ends."""

    def fail(*arguments: object) -> None:
        raise ValueError("a bug")

    with hold(tmp_path, beat_s=0.05) as lease:
        monkeypatch.setattr(lease._objects, "write", fail)
        deadline_s = time.monotonic() + 600
        with pytest.raises(ValueError, match="a bug"):
            while time.monotonic() < deadline_s:
                lease.check()
                time.sleep(0.01)


def test_an_owner_of_another_host_seems_alive_for_a_while(
    place: str, elsewhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hold(place, beat_s=1000):
        owner = current_owner(place)
        assert owner is not None and owner.age_s < lease_module.EXPIRY_S
        monkeypatch.setattr(lease_module, "EXPIRY_S", -1.0)
        assert current_owner(place) is None
