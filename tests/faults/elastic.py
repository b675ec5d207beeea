"""Row 47: hosts that never come back, or later; the run goes on with those that are there."""

import json
import random
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from jaxinfra.launchers.rendezvous import FOLDER
from jaxinfra.processes.peer_connection import free_port
from jaxinfra.storage.atomic import write_bytes_atomic
from tests.faults.config import LAST_STEP
from tests.faults.harness import TIMEOUT_S, Harness, NotSurvived, descendants, require, wait
from tests.faults.layouts import _CLOSE
from tests.faults.matrix import row

_HOSTS, _SAVE_EVERY, _LONG_EVENTS = 4, 10, 48
_READ_AHEAD = 20  # steps, so that no read is late when a process leaves
_MESH = ("mesh.replica=-1", "mesh.fsdp=1")


class Hosts:
    """Supervisors of a run, each of which stands for a host, and how far they may train.

    A host is lost with its supervisor: the kernel kills what that has started. All training is between two calls here:
    a run waits for its next batch at a step until that is allowed.
    """

    def __init__(self, harness: Harness, name: str, *words: str) -> None:
        self._harness, self._name, self._run = harness, name, harness.run(name)
        self._limit = harness.folder / f"{name}-last-step"
        address = f"127.0.0.1:{free_port('127.0.0.1')}"
        several = (f"--coordinator={address}", f"--of={_HOSTS}", f"--elastic=1..{_HOSTS}", "--elastic-wait=2")
        self._words = (*words, *several, "--supervise", "--max-restarts-per-hour=1000", "track.console=off")
        self._opened = [ExitStack() for _ in range(_HOSTS)]
        self.children = dict[int, subprocess.Popen[str]]()
        self.rounds: list[list[int]] = []  # the hosts of each
        self.told = ""  # by supervisors that were killed, and those that have ended

    def __enter__(self) -> Self:
        self.allow(0)
        return self

    def __exit__(self, *exception: object) -> None:
        for each in self._opened:
            each.close()

    def start(self, *indices: int) -> None:
        """Starts hosts."""
        for index in indices:
            words, env = (*self._words, f"--process-id={index}"), {LAST_STEP: str(self._limit)}
            started = self._harness.started(self._name, *words, env=env)
            self.children[index] = self._opened[index].enter_context(started)

    def kill(self, index: int) -> float:
        """Kills a host; returns the seconds until the others have made their next step."""
        begun_s, before, child = time.monotonic(), self.last_step, self.children.pop(index)
        child.kill()
        self.told += child.communicate()[1]
        self._opened[index].close()
        self.in_round(lambda hosts: index not in hosts)
        self.train_to(before + 1)
        return time.monotonic() - begun_s

    def compile_ahead(self) -> None:
        """Waits until the first host has compiled for fewer hosts."""
        self._look()
        first = self.children[self.rounds[-1][0]].pid
        self._until(lambda: _compiling(first), "nothing is compiled ahead")
        self._until(lambda: not _compiling(first), "it is still compiled ahead")

    def grow(self) -> None:
        """Trains on until all hosts that are there train; they join after a checkpoint."""
        self._is_ready(*(self.children.keys() - {*self.rounds[-1]}))
        self.allow(self.last_step + _SAVE_EVERY + _READ_AHEAD)
        self.in_round(lambda hosts: [*hosts] == sorted(self.children))

    def train_to(self, step: int) -> None:
        """Trains up to a step."""
        self.allow(step)
        self._until(lambda: self.last_step >= step, f"step {step} is not made")

    def allow(self, step: int) -> None:
        """Lets the run train up to a step."""
        write_bytes_atomic(self._limit, str(step).encode())

    def end(self, steps: int) -> None:
        """Trains to the end, and checks that all hosts say that it is."""
        self.allow(steps)
        for child in self.children.values():
            ended = wait(child)
            require(ended.code == 0, ended)
            self.told += ended.err

    @property
    def last_step(self) -> int:
        """The last step that was logged."""
        return max(self._run.losses(), default=0)

    def in_round(self, is_it: Callable[[Sequence[int]], bool]) -> None:
        """Waits until the last round has these hosts."""
        self._until(lambda: self._look() and is_it(self.rounds[-1]), "no such round")

    def _look(self) -> bool:
        """Reads the decisions; returns whether there are any."""
        paths = sorted((self._run.path / FOLDER).glob("round-*.json"))
        self.rounds = [[host["index"] for host in json.loads(path.read_text())["hosts"]] for path in paths]
        return bool(self.rounds)

    def _is_ready(self, *indices: int) -> None:
        """Waits until hosts are there for the next round."""
        folder, number = self._run.path / FOLDER, len(self.rounds) + 1
        for index in indices:
            path = folder / f"ready-{number:06d}-{index}.json"
            self._until(path.exists, f"host {index} is not ready for round {number}")
        time.sleep(2.0)  # until the first host has seen it

    def _until(self, condition: Callable[[], object], problem: str) -> None:
        deadline_s = time.monotonic() + TIMEOUT_S
        while not condition():
            for index, child in self.children.items():
                if child.poll() is not None:
                    raise NotSurvived(f"host {index} has ended: {child.communicate()}")
            require(time.monotonic() < deadline_s, f"{problem}: {self.rounds}")
            time.sleep(0.05)


def _compiling(pid: int) -> bool:
    """Whether a supervisor compiles ahead."""
    commands = [Path(f"/proc/{each}/cmdline") for each in descendants(pid)]
    return any(b"--compile-only" in path.read_bytes() for path in commands if path.exists())


@row(
    47,
    fault="a host that never comes back, that of process 0 too; one that comes back later",
    must="goes on with what is left, grows again; same samples, in canonical mode same bits, else losses within 1e-6",
)
def lost_hosts(harness: Harness) -> str:
    """Loses hosts of a run in canonical mode, and starts them again; with `--long` also of a run without it."""
    events = _LONG_EVENTS if harness.is_long else 4
    text = _in_canonical_mode(harness, events, random.Random(harness.seed))
    return f"{text}; {_in_plain_mode(harness)}" if harness.is_long else text


def _in_canonical_mode(harness: Harness, events: int, draw: random.Random) -> str:
    """Two hosts are lost and come back, and so on: of three that are left two train, and one is a spare."""
    name, steps = "elastic", 30 + 12 * events
    words = ("train.canonical=8", *_MESH, f"train.steps={steps}", f"checkpoint.save_every={_SAVE_EVERY}")
    reference, took_s = harness.reference(*words, processes=_HOSTS, devices=_HOSTS, steps=steps), list[float]()
    with Hosts(harness, name, *words) as hosts:
        hosts.start(*range(_HOSTS))
        hosts.train_to(5)
        hosts.compile_ahead()
        for number in range(events // 4):
            first, second = (3, 0) if not number else draw.sample(range(_HOSTS), 2)
            took_s.append(hosts.kill(first))
            hosts.train_to(hosts.last_step + 3)
            took_s.append(hosts.kill(second))
            hosts.start(first, second)
            hosts.grow()
            hosts.train_to(hosts.last_step + 3)
        if harness.is_long:
            took_s.append(hosts.kill(2))
        hosts.end(steps)
        sizes = " -> ".join(str(len(each)) for each in hosts.rounds if each)
    require("compiled ahead for 2 hosts" in hosts.told, hosts.told)
    same = harness.same_bits(name, reference)
    return f"{sizes} hosts, the next step {max(took_s):.0f} s after a kill at most; {same}"


def _in_plain_mode(harness: Harness) -> str:
    """A host is lost, and comes back: three that are left train."""
    name, steps = "elastic-plain", 60
    words = ("train.global_batch=24", *_MESH, f"train.steps={steps}", f"checkpoint.save_every={_SAVE_EVERY}")
    reference = harness.reference(*words, processes=_HOSTS, devices=_HOSTS, steps=steps)
    with Hosts(harness, name, *words) as hosts:
        hosts.start(*range(_HOSTS))
        hosts.train_to(15)
        hosts.kill(2)
        hosts.start(2)
        hosts.grow()
        hosts.end(steps)
        rounds = hosts.rounds
    run = harness.run(name)
    require(run.samples() == reference.samples, f"{name}: other samples")
    ours, theirs = (
        {step: float.fromhex(loss) for step, loss in each.items()} for each in (run.losses(), reference.losses)
    )
    worst = max(abs(ours[step] - theirs[step]) / abs(theirs[step]) for step in theirs)
    require(worst <= _CLOSE, f"{name}: a loss differs by {worst:.1e}")
    return f"{' -> '.join(str(len(each)) for each in rounds if each)} hosts: same samples, losses within {worst:.1e}"
