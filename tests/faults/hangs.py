"""Rows 14 to 16, 32, 38 and 40: processes that hang or are slow, wrong clocks, dead servers, failed starts."""

import socket
import time
from contextlib import ExitStack
from datetime import datetime

from jaxinfra.checkpoint.disk_steps import DiskSteps
from jaxinfra.config import read_record
from jaxinfra.errors import ConfigError, HungError, PeerLostError, Preempted
from jaxinfra.processes.peer_connection import free_port
from jaxinfra.storage.atomic import write_bytes_atomic
from tests.faults.config import STEPS
from tests.faults.harness import Harness, NotTried, Run, named, require, until, wait
from tests.faults.machine import faketime_library
from tests.faults.matrix import row

_HUNG, _HEARTBEAT_S = HungError.exit_code, 4
_LAST = 30  # step that row 32 compares


def _stacks(run: Run) -> str:
    return "\n".join(path.read_text() for path in sorted((run.path / "stacks").iterdir()))


@row(
    14,
    fault="SIGSTOP of a worker",
    must="stacks of all threads of the live ranks, the silent rank named, 77 within the heartbeat + 5 s; same bits",
)
def stopped_process(harness: Harness) -> str:
    """Stops process 1; the supervisor kills it, and starts again."""
    name, stop = "stopped", "step:1:25:stop"
    ended = harness.train(name, f"--heartbeat-timeout={_HEARTBEAT_S}", "--supervise", processes=2, fail=stop)
    run = harness.run(name)
    require(ended.code == 0, ended)
    first = run.attempts()[0]
    require(first["exit_code"] == _HUNG, first)
    named(first["error"], "process 1", "silent")
    named(_stacks(run), "MainThread")
    (stacks,) = (run.path / "stacks").glob("*-rank-0.txt")
    after_s = stacks.stat().st_mtime - harness.fired_s(name, stop)
    require(after_s < _HEARTBEAT_S + 5, f"stacks only after {after_s:.1f} s")
    return f"77, process 1 named and stacks written {after_s:.1f} s after; {harness.same_bits(name)}"


@row(
    15,
    fault="a hang inside of a living process: in a reader of data, in a tracker, in an evaluation",
    must="the watchdog names the phase and ends with 77; same bits",
)
def hang(harness: Harness) -> str:
    """Hangs in three phases, each with a deadline of its own."""
    name = "hang"
    hangs = ("data:0:15:sleep=600", "log:0:36:sleep=600", "evaluation:0:40:sleep=600")
    limits = [f"watchdog.{phase}_s=8" for phase in ("data", "step", "evaluation")]
    ended = harness.train(name, "--supervise", *limits, "watchdog.step_factor=2", fail=",".join(hangs))
    run = harness.run(name)
    require(ended.code == 0, ended)
    attempts = run.attempts()
    for attempt, phase in zip(attempts, ("waiting for data", "step", "evaluation"), strict=False):
        require(attempt["exit_code"] == _HUNG, attempt)
        named(attempt["error"], phase)
    named(_stacks(run), "in failpoint", "MainThread")
    require(run.goodput().seconds["lost"] > 0, "no time counts as lost")
    return f"77 three times, data, step and evaluation named; {harness.same_bits(name)}"


@row(16, fault="a straggler: one rank is 30 % slower in each step", must="named within 20 steps; no stop; same bits")
def straggler(harness: Harness) -> str:
    """Makes the host of process 1 late in each step."""
    name = "straggler"
    ended = harness.train(name, processes=2, fail="step:0:*:sleep=0.1,step:1:*:sleep=0.13")
    require(ended.code == 0, ended)
    lines = [line for line in ended.err.splitlines() if "holds up the others" in line]
    require(len(lines) == 1, ended)
    step = int(named(lines[0], "process 1").split("step ")[1].split(":")[0])
    require(step <= 20, lines[0])
    return f"process 1 named at step {step}; {harness.same_bits(name)}"


@row(
    32,
    fault="the clock of one rank is an hour late and jumps",
    must="no effect: order is by step, time is monotonic; same bits",
)
def wrong_clock(harness: Harness) -> str:
    """Gives process 1 a clock that is an hour behind; when that is set right, the clock of process 0 jumps ahead.

    Under libfaketime the waits of a clock that is behind end at once, and TensorStore keeps all cores busy until then.
    """
    library, name = faketime_library(), "clock"
    if library is None:
        raise NotTried("libfaketime is missing; install the package faketime")
    run = harness.run(name)
    clocks = [harness.folder / f"clock-{rank}.txt" for rank in range(2)]
    for clock, wrong in zip(clocks, ("+0", "-1h"), strict=True):
        clock.write_text(wrong)
    fake = {"LD_PRELOAD": str(library), "FAKETIME_DONT_FAKE_MONOTONIC": "1", "FAKETIME_CACHE_DURATION": "1"}
    with ExitStack() as stack:
        where = f"--coordinator=127.0.0.1:{free_port()}", "--of=2"
        children = [
            stack.enter_context(
                harness.started(
                    name,
                    *where,
                    f"--process-id={rank}",
                    env=fake | {"FAKETIME_TIMESTAMP_FILE": str(clock)},
                    fail=f"step:*:6:sleep=2,step:0:{_LAST + 5}:term",
                )
            )
            for rank, clock in enumerate(clocks)
        ]
        until(lambda: len(run.losses()) > 3, children[0])
        for clock, right_or_ahead in zip(clocks, ("+1h", "+0"), strict=True):
            write_bytes_atomic(clock, right_or_ahead.encode())
        ends = [wait(child) for child in children]
    require([each.code for each in ends] == [Preempted.exit_code] * 2, "; ".join(map(str, ends)))
    host, checkpoint = (datetime.fromisoformat(text) for text in _times(run))
    require(checkpoint.timestamp() > time.time() + 3000, f"the clock of process 0 did not jump: {host}, {checkpoint}")
    return harness.same_bits(name, harness.reference(processes=2, devices=2), until=_LAST)


def _times(run: Run) -> tuple[str, str]:
    """Returns when the run began and when its last checkpoint was saved, by the clock of process 0."""
    manifest = DiskSteps(run.checkpoints).manifest(max(run.steps()))
    return read_record(run.path / "run.json")["created"], manifest.saved


@row(38, fault="a metrics server that is down, and one that answers nothing", must="no step waits for it; same bits")
def dead_metrics_server(harness: Harness) -> str:
    """Sends metrics to a port that nobody listens on, and to a server that never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        ports = free_port(), silent.getsockname()[1]
        trackers = ", ".join(f"base.Http(port={port})" for port in ports)
        track = f"replace(base.config().track, trackers=({trackers}))"
        config = harness.write_config("servers", f"replace(base.config(), track={track})")
        ended = harness.train("servers", config=config)
    require(ended.code == 0, ended)
    for port in ports:
        named(ended.err, f"{port}: {STEPS + 3} of {STEPS + 3} logged rows were not sent")
    step_s = harness.run("servers").goodput().seconds["step"] / STEPS
    require(step_s < 0.5, f"a step took {step_s:.2f} s")  # a server that answers nothing would hold one for ever
    return f"a step took {step_s * 1e3:.0f} ms, all rows counted as not sent; {harness.same_bits('servers')}"


@row(
    40,
    fault="a port in use, a late rank, a missing rank at the start",
    must="a late one is waited for; else 81 or 76 within the start-up timeout, naming what is missing",
)
def failed_starts(harness: Harness) -> str:
    """Starts processes that cannot meet, and one that comes late."""
    name = "starts"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        ended = harness.train(name, f"--coordinator={address}", "--of=2", "--process-id=0", "--join-timeout=4")
    require(ended.code == ConfigError.exit_code, ended)
    named(ended.error, "in use")
    where = f"--coordinator=127.0.0.1:{free_port()}", "--of=3", "--join-timeout=4"
    ended = harness.train(name, *where, "--process-id=0")
    require(ended.code == PeerLostError.exit_code and ended.seconds < 60, ended)
    named(ended.error, "processes 1, 2 of 3", "not joined within 4 s")
    where = f"--coordinator=127.0.0.1:{free_port()}", "--of=2"
    with harness.started(name, *where, "--process-id=1") as early:
        time.sleep(4)
        first = harness.train(name, *where, "--process-id=0")
        ends = first, wait(early)
    require([each.code for each in ends] == [0, 0], "; ".join(map(str, ends)))
    text = harness.same_bits(name, harness.reference(processes=2, devices=2))
    return f"81 with the port, 76 with the missing ranks; late: {text}"
