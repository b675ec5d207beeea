"""A lease has one owner, on a disk and in a bucket; one that has lost it notices."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxinfra.errors import ConfigError
from jaxinfra.storage import lease as lease_module
from jaxinfra.storage.lease import Lease, current_owner, hold
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
    with hold(place), raises(ConfigError, f"{place} process {os.getpid()}"), hold(place):
        pass


def test_a_living_owner_on_another_host_is_seen_by_its_beats(place: str, elsewhere: None) -> None:
    with hold(place, **QUICK), raises(ConfigError, f"{place} process {os.getpid()}"), hold(place, **QUICK):
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
            with pytest.raises(ConfigError) as error:
                first.check_now()
            names(str(error.value), f"{place} taken over")
            with pytest.raises(ConfigError):
                first.check()
    assert current_owner(place) is None


def test_beats_notice_the_loss(place: str, elsewhere: None) -> None:
    with hold(place, beat_s=3 * EXPIRY_S) as first, hold(place, **QUICK):
        deadline_s = time.monotonic() + 30
        while not _is_lost(first):
            assert time.monotonic() < deadline_s
            time.sleep(0.05)


def _is_lost(lease: Lease) -> bool:
    try:
        lease.check()
    except ConfigError:
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
    with raises(ConfigError, f"{place} process {child.pid}"), hold(place):
        pass
    child.send_signal(signal.SIGSTOP)  # a stopped one lives
    with raises(ConfigError, f"{place} process {child.pid}"), hold(place):
        pass
    child.kill()
    child.communicate()
    start_s = time.monotonic()
    with hold(place) as lease:
        assert lease.token == 2
        assert time.monotonic() - start_s < lease_module.EXPIRY_S / 2


def test_many_at_once(tmp_path: Path) -> None:
    """One of several processes that start together gets it."""
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for _ in range(6)
    ]
    try:
        deadline_s = time.monotonic() + 60
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


def test_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "lease").mkdir()
    (tmp_path / "lease" / "00000001.json").write_text("{")
    with raises(ConfigError, "00000001.json lease"), hold(tmp_path):
        pass
