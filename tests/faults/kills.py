"""Rows 1 to 9 and 39: processes that are killed, at any moment."""

import hashlib
import random
import signal
import time
from datetime import datetime
from pathlib import Path

from jaxinfra.track.jsonl import SUMMARY_FILE
from tests.faults.config import STEPS
from tests.faults.harness import Harness, NotTried, Run, named, require
from tests.faults.machine import memory_limit
from tests.faults.matrix import row

_LIMIT_BYTES = 3 << 30  # of all processes
_SYNC = "checkpoint.async_save=false"  # so that it is known which save is complete
_LEAVE_S = 10.0  # 0.3 s without other work on the machine
_KILLED = 76  # another process was lost, or a signal killed it


def _first_steps(run: Run) -> list[int | None]:
    return [attempt["first_step"] for attempt in run.attempts()]


@row(
    *(1, 2, 3, 4, 5),
    fault="kill -9 of a worker and of the coordinator, in the middle of a step; while a save copies from the devices, "
    "while each rank writes shards, before the manifest",
    must="the other process exits with 76, the supervisor starts again; the newest intact step is unchanged, the "
    "half-written one is never listed; same bits",
)
def in_steps_and_saves(harness: Harness) -> str:
    """Kills one of two processes twice while the devices compute, and in four saves."""
    saves = ("save.copy:0:10:kill", "save.write:1:20:kill", "save.write:0:30:kill", "save.manifest:0:40:kill")
    kills = ("step:1:5:kill", "step:0:8:kill", *saves)
    ended, run = harness.train("kills", "--supervise", processes=2, fail=",".join(kills)), harness.run("kills")
    require(ended.code == 0, ended)
    left_s = []
    for kill, attempt in zip(kills, run.attempts(), strict=False):
        found = attempt["exit_code"], attempt["signal"], attempt["rank"]
        require(found == (_KILLED, "SIGKILL", int(kill.split(":")[1])), f"{kill}: {attempt}")
        left_s.append(datetime.fromisoformat(attempt["ended"]).timestamp() - harness.fired_s("kills", kill))
    for rank in (0, 1):
        log = (run.path / f"logs/rank-{rank}.log").read_text()
        require(f"process {1 - rank}" in log and "Traceback" not in log, f"rank {rank} does not name the other: {log}")
    # A step is gone with each kill in its save, and is saved by the next start.
    require(_first_steps(run) == [1, 1, 1, 1, 11, 21, 31], _first_steps(run))
    require("damaged" not in ended.out + ended.err, ended)
    require(max(left_s) < _LEAVE_S, f"the others have left after {left_s} s")
    left = f"76 after at most {max(left_s):.1f} s"
    return f"{left}, resumed from steps 0, 10, 20, 30, half-written ones never seen; {harness.same_bits('kills')}"


@row(
    *(6, 7),
    fault="kill -9 after the manifest, before older steps are deleted; in the middle of a deletion",
    must="the new step is listed, never fewer than keep_last, leftovers are swept; same bits",
)
def in_a_deletion(harness: Harness) -> str:
    """Kills process 0 around the deletion of an older step."""
    words, name = ("checkpoint.keep_last=2", "--supervise"), "deletion"
    run = harness.run(name)
    for point, step, expected in (("save.delete", 30, [10, 20, 30]), ("save.deleting", 50, [40, 50])):
        kill = f"{point}:0:{step}:kill"
        # Without restarts, to look at what the kill has left.
        ended = harness.train(name, *words, "--max-restarts-per-hour=0", fail=kill)
        require(ended.code == _KILLED and run.steps() == expected, f"{kill}: {run.steps()} of {expected}; {ended}")
    ended = harness.train(name, *words)
    first = [attempt["first_step"] for attempt in run.attempts()]
    require(ended.code == 0 and first == [1, 31, 51], f"{first}: {ended}")
    left = sorted(path.name for path in run.checkpoints.iterdir())
    require(left == ["50", "60"], left)
    text = harness.same_bits(name)
    return f"steps 10, 20, 30 and 40, 50 were there, leftovers swept by the next start; {text}"


@row(8, fault="kill -9 during a restore", must="no byte of the checkpoint changes; the next start gives the same bits")
def in_a_restore(harness: Harness) -> str:
    """Kills a process at random moments of its restore, and after the verification."""
    name = "restore"
    ended = harness.train(name, _SYNC, fail="step:0:34:kill")
    require(ended.code == -signal.SIGKILL, ended)
    run = harness.run(name)
    before, draw, moments = _hashes(run.checkpoints), random.Random(0), 20 if harness.is_long else 1
    start_s = time.monotonic()
    require(harness.train(name, fail="restore:0:30:kill").code == -signal.SIGKILL, "not killed")
    restore_s = time.monotonic() - start_s
    for _ in range(moments):
        with harness.started(name, fail="step:0:*:sleep=600") as child:  # it makes no step
            time.sleep(restore_s * draw.uniform(0.7, 1.2))
            require(child.poll() is None, "ended before the kill")
    require(_hashes(run.checkpoints) == before, "a checkpoint has changed")
    require(harness.train(name).code == 0, "did not end")
    return f"{moments + 1} kills, no byte of 3 checkpoints changed; {harness.same_bits(name)}"


def _hashes(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@row(
    9,
    fault="kill -9 during compile, before step 0, during an evaluation, after the last step",
    must="same bits; a finished run started again exits with 0 at once",
)
def at_other_moments(harness: Harness) -> str:
    """Kills a process in each other phase."""
    kills = ("init:0:0:kill", "compile:0:0:kill", "evaluation:0:20:kill", "end:0:60:kill")
    name = "moments"
    ended = harness.train(name, "--supervise", fail=",".join(kills))
    run = harness.run(name)
    require(ended.code == 0 and len(run.attempts()) == len(kills) + 1, ended)
    require((run.path / SUMMARY_FILE).exists(), "no summary.json after the last kill")
    text = harness.same_bits(name)
    again = harness.train(name)
    require(again.code == 0 and f"all {STEPS} steps" in again.out, again)
    return f"4 kills, 5 starts; started again: nothing to do; {text}"


@row(39, fault="the kernel kills a process that is out of memory (a memory cgroup)", must="as row 1")
def out_of_memory(harness: Harness) -> str:
    """Lets the kernel kill a process, in a memory cgroup whose limit is lowered."""
    name = "memory"
    with memory_limit(_LIMIT_BYTES) as prefix:
        if not prefix:
            raise NotTried("no memory cgroup can be made; it needs root and the memory controller")
        ended = harness.train(name, "--supervise", processes=2, fail="step:1:25:oom", prefix=prefix)
    run = harness.run(name)
    first = run.attempts()[0]
    require(ended.code == 0 and (first["exit_code"], first["signal"]) == (_KILLED, "SIGKILL"), ended)
    named(ended.err, "killed by SIGKILL")
    return f"killed by the kernel, started again; {harness.same_bits(name)}"
