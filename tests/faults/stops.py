"""Rows 10 to 13, 35, 36 and 43: requests to stop, and starts that must not go on."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from jaxinfra.errors import ConfigError, Preempted, RunInUseError
from jaxinfra.track.goodput import GOODPUT_FILE, read_ledger
from tests.faults.harness import Harness, NotSurvived, descendants, named, require, until, wait
from tests.faults.matrix import row

_PREEMPTED, _KILLED = Preempted.exit_code, 76  # another process was lost, or a signal killed it
_SLOW = "step:*:*:sleep=0.1"  # steps that take longer than the processes need to agree on one


@row(
    *(10, 11, 12),
    fault="SIGTERM to rank 0, to rank 1, to all, twice during the save; with a grace shorter than the save (kill -9 "
    "follows); during an asynchronous save",
    must="all ranks save the same step and leave with 75 within a step and the save, or go on from the last periodic "
    "checkpoint; one commit, no deadlock; same bits",
)
def sigterm(harness: Harness) -> str:
    """Sends SIGTERM again while it is saved, then to one process, to both at once, and around saves, in one run."""
    name, steps = "sigterm", []
    # Each with the rank that sleeps in its steps, so that no other one is ahead of the one that is asked: it would have
    # promised a step more.
    cases = (
        ("step:0:5:term,save.write:0:*:term,save.write:1:*:term", 1),
        ("step:0:16:term", 1),
        ("step:1:27:term", 0),
        ("step:0:38:term,step:1:38:term", "*"),
    )
    for case, slow in cases:
        ended = harness.train(name, processes=2, fail=f"{case},step:{slow}:*:sleep=0.2")
        require(ended.code == _PREEMPTED, f"{case}: {ended}")
        steps.append(max(harness.run(name).steps()))
        asked = int(case.split(":")[2])
        require(asked <= steps[-1] <= asked + 1, f"{case}: saved step {steps[-1]}")
        named(ended.err, "stopped by SIGTERM to process", f"after step {steps[-1]} of")
    in_save = _sigterm_in_a_save(harness, name)
    _short_grace(harness, name)
    ended = harness.train(name, processes=2)
    require(ended.code == 0, ended)
    named(ended.out, "at step 50 of")
    require(ended.out.count("Summary") == 1 and "Gloo" not in ended.out, ended)
    asked = f"asked in steps 5, 16, 27, 38, saved {', '.join(map(str, steps))}, each with 75"
    return f"{asked}; {in_save}; resumed from step 50 after a short grace; {harness.same_bits(name)}"


def _sigterm_in_a_save(harness: Harness, name: str) -> str:
    """Sends SIGTERM from the thread that writes the periodic checkpoint of step 40."""
    ended = harness.train(name, processes=2, fail="save.write:0:40:term,save.write:1:40:sleep=1")
    run = harness.run(name)
    require(ended.code == _PREEMPTED, ended)
    steps, left = run.steps(), [path.name for path in run.checkpoints.iterdir() if not path.name.isdecimal()]
    require(40 in steps and not left, f"{steps}, {left}")
    return f"75 in the save of step 40, nothing left over, newest {max(steps)}"


def _short_grace(harness: Harness, name: str) -> None:
    """Kills all processes in the save that a SIGTERM has asked for, and leaves a newest checkpoint of step 50."""
    hold = ",".join(f"save.write:0:{step}:sleep=600" for step in range(53, 60))
    with harness.started(name, processes=2, fail=f"step:0:53:term,{hold},{_SLOW}") as launcher:
        run = harness.run(name)
        until(lambda: any(harness.has_fired(name, each) for each in hold.split(",")), launcher)
        for rank in descendants(launcher.pid):
            with suppress(ProcessLookupError):  # it has noticed the end of the other one, and left
                os.kill(rank, signal.SIGKILL)
        ended = wait(launcher)
    named(ended.error, "killed by SIGKILL", "start the same command")
    require(ended.code == _KILLED and max(run.steps()) == 50, f"{run.steps()}: {ended}")


@row(
    43,
    fault="SIGTERM while a read of data hangs in a thread of Grain; then a hang after the last save, as of a tracker",
    must="75 within the watchdog's limit, saved, what hangs is named; same bits",
)
def sigterm_while_something_hangs(harness: Harness) -> str:
    """Lets a batch hang that is read ahead, and then the end of the run."""
    name = "hanging"
    for step, hang, where in ((20, "data:0:30", "grain-prefetch"), (40, "end:0:40", "MainThread")):
        ended = harness.train(name, "watchdog.end_s=3", fail=f"step:0:{step}:term,{hang}:sleep=600")
        require(ended.code == _PREEMPTED and max(harness.run(name).steps()) == step, ended)
        named(ended.err, f"after step {step} of", "saved", "without waiting for", where)
    require(harness.train(name).code == 0, "did not go on")
    return f"75 and saved twice, the threads named; {harness.same_bits(name)}"


@contextmanager
def _metadata_server() -> Iterator[tuple[str, threading.Event]]:
    """A metadata server as Google Cloud's; once the event is set, this spot machine ends."""
    ends = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_right = self.headers["Metadata-Flavor"] == "Google"
            is_spot = self.path.endswith("/preempted")
            self.send_response(200 if is_right else 403)
            self.end_headers()
            self.wfile.write((("TRUE" if ends.is_set() else "FALSE") if is_spot else "NONE").encode())

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}", ends
        finally:
            server.shutdown()
            thread.join()


@row(
    13,
    fault="notice of a metadata server that the machine ends",
    must="saved before the deadline; the notice is in the last line and in the goodput ledger",
)
def maintenance_notice(harness: Harness) -> str:
    """Announces the end of a spot machine while the run trains."""
    name = "notice"
    run = harness.run(name)
    with _metadata_server() as (address, ends):
        env = {"JAXINFRA_METADATA": "google", "GCE_METADATA_HOST": address}
        with harness.started(name, fail="step:0:*:sleep=0.3", env=env) as child:
            until(lambda: len(run.losses()) > 2, child)
            ends.set()
            announced_s = time.monotonic()
            ended = wait(child)
            saved_s = time.monotonic() - announced_s
    require(ended.code == _PREEMPTED, ended)
    named(ended.err, "stopped by the notice of Google Cloud that this spot machine ends")
    require(saved_s < 30, f"saved after {saved_s:.1f} s, the machine ends after 30 s")
    ledger = (run.path / GOODPUT_FILE).read_text()
    require(read_ledger(run.path / GOODPUT_FILE) and "notice of Google Cloud" in ledger, "no event in the ledger")
    require(harness.train(name).code == 0, "did not go on")
    return f"75, saved {saved_s:.1f} s after the notice, which is in the ledger; {harness.same_bits(name)}"


@row(35, fault="two supervisors of one run", must="the second is refused (84) and names the process that holds it")
def two_supervisors(harness: Harness) -> str:
    """Starts a second supervisor while the first one's child trains."""
    name = "twice"
    run = harness.run(name)
    with harness.started(name, "--supervise", fail="step:0:15:sleep=600") as first:
        until(lambda: len(run.losses()) > 10, first)
        second = harness.launch(*harness.words(name, "--supervise", "--devices=cpu:1"))
        require(second.code == RunInUseError.exit_code, second)
        holders = [str(pid) for pid in descendants(first.pid)]
        named_pid = next((pid for pid in holders if f"process {pid} " in second.err), None)
        if named_pid is None:
            raise NotSurvived(f"none of {holders} is named: {second.err}")
        os.kill(int(named_pid), signal.SIGKILL)  # it sleeps
        ended = wait(first)
    require(ended.code == 0, ended)
    return f"refused with 84, the holder named; {harness.same_bits(name)}"


@row(
    36,
    fault="a config that is edited between two starts",
    must="the difference is shown; one that changes the numbers is refused, or accepted by --accept-change",
)
def edited_config(harness: Harness) -> str:
    """Changes the learning rate, and how often it is logged, between two starts."""
    name = "edited"
    ended = harness.train(name, fail="step:0:24:term")
    require(ended.code == _PREEMPTED, ended)
    refused = harness.train(name, "optim.peak_lr=1e-3")
    require(refused.code == ConfigError.exit_code, refused)
    named(refused.error, "optim.peak_lr", "0.003", "0.001", "--accept-change")
    accepted = harness.train(name, "optim.peak_lr=1e-3", "track.log_every=2", "--accept-change")
    require(accepted.code == 0, accepted)
    record = json.loads((harness.run(name).path / "run.json").read_text())
    (change,) = record["changes"]
    require(change["step"] in (24, 25, 26) and "optim.peak_lr" in json.dumps(change), record["changes"])
    named(accepted.err, "optim.peak_lr")
    return "another learning rate is refused with 81, both values shown; accepted, it is in run.json with its step"
