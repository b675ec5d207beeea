"""Agrees on the hosts of the next start of an elastic run, through files in its run directory. Imports no JAX.

Starts are called rounds, as in torchelastic, and counted from 1 over the life of a run. In `RUN/elastic/` there are

    ready-ROUND-HOST.json   a host that is there for a round; it rewrites the file as a sign of life (`Ready`)
    running-ROUND-HOST.json a host that trains in a round; its supervisor rewrites the file likewise (`Running`)
    round-ROUND.json        the decision: who trains, or how the run has ended (`Round`); created once, never changed

No host is special, and none need know the address of another: of the hosts that are there, the one with the smallest
index decides. If two think that they are the one, the file is created by one of them alone. A host counts as there only
if its file changes while others watch, by their own clocks, so that neither clocks nor what is left of dead hosts
matter.

A round is over once one of its hosts is ready for the next, or when all of them have been silent for as long as makes a
process count as lost. A host that was not in it waits until it is.
"""

import json
import threading
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Self

from jaxinfra.errors import PeerLostError, RunInUseError, StorageError
from jaxinfra.launchers.rounds import Bounds, Host, Ready, Round, Running, parse_host
from jaxinfra.launchers.signs_of_life import Signs
from jaxinfra.launchers.supervisor import Watch
from jaxinfra.storage.location import is_remote
from jaxinfra.storage.shared_files import shared_files

FOLDER = "elastic"
_BEAT_S, _BUCKET_BEAT_S = 0.5, 2.0
"""Seconds between two signs of life on a disk, and in a bucket, which counts requests."""
_LOOKS = 4
"""Looks after which a host says for whom it waits; the others may come at about the same time."""
_PATIENCE = 5
"""The wait for the fewest hosts, in waits for all hosts at the first start."""
_DEAD_BEATS = 6
"""Signs of life that may fail to come."""


class Rendezvous:
    """The place where a host meets the others.

    Args:
        location: path or URL of the run.
        host: this one.
        bounds: how many hosts there may be.
    """

    def __init__(self, location: str, host: Host, bounds: Bounds) -> None:
        self._files, self._location = shared_files(location, FOLDER, make=True), location
        self._host, self._bounds = host, bounds
        self._beat_s = _BUCKET_BEAT_S if is_remote(location) else _BEAT_S
        self._round = Round(number=0)  # the last one that this supervisor has trained in
        self._supervisor, self._beat = uuid.uuid4().hex, 0
        self._signs = Signs(self._beat_s * _DEAD_BEATS)
        self._left = set[tuple[int, int]]()  # rounds, and the hosts that have said that they will not be there

    def meet(self, *, is_stopped: Callable[[], bool], say: Callable[[str], None]) -> Round | None:
        """Waits for a round that this host trains in, or for the end of the run; None if it is stopped meanwhile.

        Raises PeerLostError if there are too few hosts for too long, RunInUseError if another supervisor is this host.
        """
        asked, told = _Asked(begun_s=time.monotonic()), ""
        while not is_stopped():
            try:
                if not asked.number:
                    asked.number = self._first_number()
                found = self._ask(asked)
            except StorageError as error:
                if time.monotonic() - asked.begun_s > self._bounds.join_s:
                    raise
                found = f"{error}; trying again"
            if isinstance(found, Round):
                self._round = found
                return found
            if found and found != told:
                say(found)
                told = found
            time.sleep(self._beat_s)
        with suppress(StorageError):  # then the others wait for this host
            self.leave()
        return None

    def _first_number(self) -> int:
        """Returns the number of the round to ask for first.

        One that has trained looks at all decisions since then: the run may have ended. A new one begins with the next.
        """
        if self._round.number:
            return self._round.number + 1
        number, own = self._next_number(), self._host.index
        names = (_running_file(number - 1, own), _ready_file(number, own))
        before = [self._files.read_or_none(name) for name in names]
        until_s = time.monotonic() + _DEAD_BEATS * self._beat_s
        while any(before) and time.monotonic() < until_s:
            time.sleep(self._beat_s)
            if before != [self._files.read_or_none(name) for name in names]:
                raise RunInUseError(
                    f"{self._location}: host {own} of this run has another supervisor, which is alive; leave the run "
                    "to it, or give this one another --process-id"
                )
        return number

    def _ask(self, asked: "_Asked") -> Round | str:
        """Returns the round, if it is decided and this host trains in it; else what this host waits for, if it knows.

        If it is for this host to decide, it does so.
        """
        if (decided := self._decided(asked.number)) is not None:
            if decided.code is not None or self._host.index in decided.indices:
                self._delete_older(asked.number)
                return decided
            asked.begin(asked.number + 1)
            asked.is_spare = True
            return f"{decided}; this host waits until it is needed"
        self._write_ready(asked.number)
        others = self._others(asked.number)
        present = {index: each for index, each in others.items() if not each.has_left}
        present[self._host.index] = self._ready()
        last = self._decided(asked.number - 1)
        if last is not None and self._is_running(last, present):
            asked.begin(asked.number)
            return f"round {last.number} trains; this host waits for its next checkpoint, and until it is needed"
        if min(present) < self._host.index:
            return ""
        waited_s = time.monotonic() - asked.begun_s
        left = {index for number, index in self._left if number == asked.number}
        is_first = not (asked.is_spare or any(each.last_round for each in present.values()))
        if (hosts := self._due(None if is_first else last, present, left, waited_s)) is not None:
            self._decide(asked.number, present, hosts)
            return ""
        if waited_s > _PATIENCE * self._bounds.join_s:
            raise PeerLostError(
                f"{self._location}: {len(present)} of at least {self._bounds.least} hosts are there after "
                f"{waited_s:.0f} s; start the others, or lower the first number of --elastic"
            )
        if waited_s < _LOOKS * self._beat_s:
            return ""
        absent = sorted({*range(self._bounds.most)} - present.keys())
        return f"waiting for {'host' if len(absent) == 1 else 'hosts'} {', '.join(map(str, absent))}"

    def end(self, code: int) -> None:
        """Records that the run has ended, for hosts that wait."""
        ended = Round(number=self._round.number + 1, code=code)
        self._files.create(_round_file(ended.number), json.dumps(asdict(ended)).encode())

    def leave(self) -> None:
        """Records that this host will not be there: the others need not wait for it."""
        self._write_ready(self._next_number(), has_left=True)

    # For `RoundWatch`

    def look_at_round(self, *, has_stepped: bool) -> tuple[bool, bool]:
        """Returns whether the round of this host is over, and whether this one asks for a round of more hosts.

        Until its processes have stepped, they may wait for a host that is lost; later they notice by themselves.
        """
        number, hosts = self._round.number + 1, self._round.indices
        self.say_running()
        others = self._others(number)
        is_over = any(index in hosts and not (each.has_left and has_stepped) for index, each in others.items())
        is_over = is_over or self._decided(number) is not None
        if not has_stepped:
            lost = [index for index in hosts if index != self._host.index and not self._runs(self._round, index)]
            is_over = is_over or bool(lost)
        there = [index for index, each in others.items() if index not in hosts and not each.has_left]
        can_grow = len(self._bounds.chosen([*hosts, *there])) > len(hosts)
        return is_over, can_grow and self._host.index == hosts[0]

    def say_running(self, *, has_ended: bool = False) -> None:
        """Tells the others that the processes of this host train, or have ended."""
        self._beat += 1
        running = Running(beat=self._beat, supervisor=self._supervisor, has_ended=has_ended)
        self._files.write(_running_file(self._round.number, self._host.index), json.dumps(asdict(running)).encode())

    def say_leaving(self) -> None:
        """Tells the others that this host will be there, once its processes have ended."""
        self._write_ready(self._round.number + 1, is_leaving=True)

    @property
    def beat_s(self) -> float:
        """Seconds between two signs of life."""
        return self._beat_s

    # Files

    def _next_number(self) -> int:
        """Returns the number of the next round that is not decided."""
        decided = [_number(name) for name in self._files.list_names() if name.startswith("round-")]
        return max([self._round.number, *decided]) + 1

    def _decided(self, number: int) -> Round | None:
        content = self._files.read_or_none(_round_file(number))
        if content is None:
            return None
        try:
            return Round.parse(content)
        except (ValueError, TypeError, KeyError, AttributeError):
            where = f"{self._location}/{FOLDER}/{_round_file(number)}"
            raise StorageError(f"{where}: is damaged; delete it, and start the hosts again") from None

    def _others(self, number: int) -> dict[int, Ready]:
        """Returns what the other hosts say for a round, of those that show signs of life or have left."""
        prefix = f"ready-{number:06d}-"
        names = [name for name in self._files.list_names() if name.startswith(prefix) and name.endswith(".json")]
        self._signs.look(number, names)
        found = {}
        for name in names:
            try:
                values = json.loads(self._files.read_or_none(name) or b"")
                each = Ready(**values | {"host": parse_host(values["host"])})
            except (ValueError, TypeError, KeyError, AttributeError):  # of another program, or a disk that was full
                continue
            index = each.host.index
            if not 0 <= index < self._bounds.most or index == self._host.index:
                continue
            if is_alive := self._signs.is_alive(name, each.beat):
                (self._left.add if each.has_left else self._left.discard)((number, index))
            if is_alive or (number, index) in self._left:
                found[index] = each
        return found

    def _ready(self) -> Ready:
        return Ready(host=self._host, last_round=self._round.number, beat=self._beat, supervisor=self._supervisor)

    def _write_ready(self, number: int, *, is_leaving: bool = False, has_left: bool = False) -> None:
        self._beat += 1
        ready = replace(self._ready(), is_leaving=is_leaving, has_left=has_left)
        self._files.write(_ready_file(number, self._host.index), json.dumps(asdict(ready)).encode())

    def _is_running(self, last: Round, present: Mapping[int, Ready]) -> bool:
        """Whether a round trains, as far as those know that are there for the next one."""
        if last.code is not None or any(each.last_round == last.number for each in present.values()):
            return False
        return any(self._runs(last, index) for index in last.indices if index != self._host.index)

    def _runs(self, of: Round, index: int) -> bool:
        """Whether a host of a round may train: it shows signs of life, or was not watched for long enough."""
        name, silence_s = _running_file(of.number, index), self._bounds.silence_s
        self._signs.look(name, [name])
        is_watched = self._signs.is_watched(name, silence_s)
        content = self._files.read_or_none(name)
        if content is None:  # not yet
            return not is_watched
        try:
            running = Running(**json.loads(content))
        except (ValueError, TypeError):
            return False
        return not running.has_ended and (self._signs.is_alive(name, running.beat, silence_s) or not is_watched)

    def _delete_older(self, number: int) -> None:
        """Deletes the files of earlier rounds but the decisions."""
        for name in self._files.list_names():
            if name.startswith(("ready-", "running-")) and 0 < _number(name) < number:
                self._files.delete(name)

    # Decisions

    def _due(
        self, last: Round | None, present: Mapping[int, Ready], left: Collection[int], waited_s: float
    ) -> Sequence[int] | None:
        """Returns the hosts that train in the next round; None if others may still come.

        `last` is the round before; None for the first start of a job, at which all hosts are waited for. Nobody waits
        for hosts that were not in the last round, nor for those that have left.
        """
        if any(each.is_leaving for each in present.values()):
            return None
        expected, limit_s = range(self._bounds.most), self._bounds.join_s
        before: Sequence[int] = ()
        if last is not None and last.code is None:
            before = expected = last.indices
            limit_s = max(self._bounds.wait_s, _DEAD_BEATS * self._beat_s)  # sooner nobody can know
        if {*expected} - {*left} - present.keys() and waited_s < limit_s:
            return None
        return self._bounds.chosen([*present], before) or None

    def _decide(self, number: int, present: Mapping[int, Ready], hosts: Sequence[int]) -> None:
        decision = Round(
            number=number,
            hosts=[present[index].host for index in hosts],
            spares=sorted(present.keys() - {*hosts}),
            absent=sorted({*range(self._bounds.most)} - present.keys()),
            overrides=list(self._bounds.overrides[len(hosts)]),
        )
        self._files.create(_round_file(number), json.dumps(asdict(decision)).encode())


class RoundWatch(Watch):
    """A thread that watches the round while its processes run.

    A host of the round that is ready for the next one says that it is over.

    Args:
        rendezvous: has met for the round.
        ahead: is called again and again, once the processes have completed a step.
    """

    def __init__(self, rendezvous: Rendezvous, ahead: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self._rendezvous, self._ahead, self._ended = rendezvous, ahead, threading.Event()
        self._thread = threading.Thread(target=self._look, name="elastic", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()
        with suppress(StorageError):  # then the others wait until it is silent
            self._rendezvous.say_running(has_ended=True)

    def _look(self) -> None:
        while not self._ended.wait(self._rendezvous.beat_s):
            try:
                if self.is_over:
                    self._rendezvous.say_leaving()
                else:
                    self.is_over, self.can_grow = self._rendezvous.look_at_round(has_stepped=self.has_stepped)
            except StorageError:  # away: the training itself finds out
                continue
            if self.has_stepped and not self.is_over:
                self._ahead()


@dataclass
class _Asked:
    """State of a host that waits for a round.

    Attributes:
        begun_s: since when; while a round trains, since now.
        number: of the round; 0 if it does not know yet.
        is_spare: whether a round was decided without it meanwhile.
    """

    begun_s: float
    number: int = 0
    is_spare: bool = False

    def begin(self, number: int) -> None:
        """Begins to wait for a round."""
        self.number, self.begun_s = number, time.monotonic()


def _round_file(number: int) -> str:
    return f"round-{number:06d}.json"


def _running_file(number: int, index: int) -> str:
    return f"running-{number:06d}-{index}.json"


def _ready_file(number: int, index: int) -> str:
    return f"ready-{number:06d}-{index}.json"


def _number(name: str) -> int:
    """Returns the number of a round in the name of a file; 0 if there is none."""
    digits = name.removesuffix(".json").split("-")[1:2]
    return int(digits[0]) if digits and digits[0].isdecimal() else 0
