"""The servers themselves: what tests of the project rely on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import tensorstore as ts

_PARENT = """
import sys, time
from pathlib import Path
from tests.servers.guard import guarded
server = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
with guarded([sys.executable, "-c", server], Path(sys.argv[1])):
    time.sleep(600)
"""


def test_a_server_ends_with_a_parent_that_is_killed(tmp_path):
    log = tmp_path / "log"
    parent = subprocess.Popen([sys.executable, "-c", _PARENT, log], start_new_session=True)
    while not (log.exists() and log.read_text().endswith("\n")):
        time.sleep(0.05)
        assert parent.poll() is None
    os.killpg(parent.pid, signal.SIGKILL)
    parent.wait()
    for _ in range(100):
        if not Path(f"/proc/{int(log.read_text())}").exists():
            return
        time.sleep(0.05)
    raise AssertionError("the server outlived its parent")


def test_a_write_on_a_condition_that_no_longer_holds_is_refused(gcs):
    objects = ts.KvStore.open(gcs.new_url() + "/").result()
    first = objects.write("a", b"first").result().generation
    second = objects.write("a", b"second", if_equal=first).result().generation
    assert second != first
    objects.write("a", b"third", if_equal=first).result()
    objects.write("a", b"third", if_equal=objects.read("no such").result().stamp.generation).result()
    assert objects.read("a").result().value == b"second"
    objects.write("a", None, if_equal=first).result()
    assert objects.read("a").result().value == b"second"


def test_a_listing_has_every_page(gcs):
    objects = ts.KvStore.open(gcs.new_url() + "/").result()
    names = [f"{number:03}".encode() for number in range(120)]
    for future in [objects.write(name, b"") for name in names]:
        future.result()
    assert sorted(objects.list().result()) == names
