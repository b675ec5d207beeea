"""Agrees on the hosts of the next start of an elastic run, through files in its run directory. Imports no JAX.

Starts are called rounds, as in torchelastic, and counted from 1 over the life of a run. In `RUN/elastic/` there are

    ready-ROUND-HOST.json   a host that is there for a round; it rewrites the file as a sign of life (`Ready`)
    running-ROUND.json      a round that trains; the supervisor of its process 0 rewrites it as a sign of life
    round-ROUND.json        the decision: who trains, or how the run has ended (`Round`); created once, never changed

No host is special, and none need know the address of another: of the hosts that are there, the one with the smallest
index decides. If two think that they are the one, the file is created by one of them alone. A host counts as there only
if its file changes while others watch, by their own clocks, so that neither clocks nor what is left of dead hosts
matter.

A round is over once one of its hosts is ready for the next. A host that was not in it waits until it is.
"""

import json
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from typing import Any, Self

from jaxinfra.errors import PeerLostError, StorageError
from jaxinfra.launchers.supervisor import Watch
from jaxinfra.storage.location import is_remote
from jaxinfra.storage.shared_files import shared_files

FOLDER = "elastic"
_BEAT_S, _BUCKET_BEAT_S = 0.5, 2.0
"""Seconds between two signs of life on a disk, and in a bucket, which counts requests."""
_LOOKS = 4
"""Looks after which a host says for whom it waits; the others may come at about the same time."""
_PATIENCE = 5
"""How many times as long as for all hosts at the first start the fewest ones are waited for: as many starts as without
a new step are a crash loop."""
_DEAD_BEATS = 6
"""Signs of life that may fail to come."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """A host of an elastic run.

    Attributes:
        index: among all hosts that the run may have.
        name: for people.
        address: HOST:PORT at which the others reach its process, if that is process 0.
    """

    index: int
    name: str
    address: str


@dataclass(frozen=True, kw_only=True)
class Ready:
    """What a host says while it waits for a round.

    Attributes:
        host: which one.
        last_round: the last round that this supervisor has trained in; 0 if it has just begun.
        is_leaving: whether its processes of that round have not ended yet.
        has_left: whether somebody has stopped it: it will not be there.
        beat: grows with each sign of life.
    """

    host: Host
    last_round: int
    is_leaving: bool = False
    has_left: bool = False
    beat: int = 0


@dataclass(frozen=True, kw_only=True)
class Round:
    """A decision.

    Attributes:
        number: of the round, from 1.
        hosts: those that train, in the order of their processes; () if the run has ended.
        spares: indices of hosts that are there but not needed.
        absent: indices of hosts that are not there.
        overrides: of the config, for the mesh of these hosts.
        code: the exit code of a run that has ended; None if it goes on.
        decided: when, in UTC by the clock of the host that has decided.
    """

    number: int
    hosts: Sequence[Host] = ()
    spares: Sequence[int] = ()
    absent: Sequence[int] = ()
    overrides: Sequence[str] = ()
    code: int | None = None
    decided: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))

    @property
    def indices(self) -> Sequence[int]:
        """Indices of the hosts that train."""
        return [host.index for host in self.hosts]

    def __str__(self) -> str:
        hosts = f"{len(self.hosts)} {'host' if len(self.hosts) == 1 else 'hosts'}"
        more = "".join(
            f", {what} {', '.join(map(str, indices))}"
            for what, indices in (("without", self.absent), ("spare", self.spares))
            if indices
        )
        return f"round {self.number}: {hosts}{more}"

    @classmethod
    def parse(cls, content: bytes) -> Self:
        """Raises ValueError, TypeError or KeyError for what is no decision."""
        values = json.loads(content)
        values |= {"hosts": [_host(each) for each in values["hosts"]]}
        return cls(**{each.name: values[each.name] for each in fields(cls)})


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """How many hosts a run may have.

    Attributes:
        least: the fewest hosts.
        most: the most; their indices are below it.
        together: hosts that train together or not at all, such as those of a slice of TPUs; index // together says
            which ones.
        overrides: of the config, by each number of hosts that it trains on.
        wait_s: time that a host gets to come back.
        join_s: time that all hosts get at the first start.
    """

    least: int
    most: int
    together: int = 1
    overrides: Mapping[int, Sequence[str]]
    wait_s: float
    join_s: float

    def chosen(self, present: Sequence[int]) -> Sequence[int]:
        """Returns the hosts that train, of those that are there: as many as the run can be divided among."""
        groups: dict[int, list[int]] = {}
        for index in sorted(present):
            groups.setdefault(index // self.together, []).append(index)
        whole = [index for group in groups.values() if len(group) == self.together for index in group]
        fitting = [n for n in self.overrides if self.least <= n <= len(whole) and n % self.together == 0]
        return whole[: max(fitting, default=0)]


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
        self._beat = 0
        self._signs = _Signs(self._beat_s * _DEAD_BEATS)

    def meet(self, *, is_stopped: Callable[[], bool], say: Callable[[str], None]) -> Round | None:
        """Waits for a round that this host trains in, or for the end of the run; None if it is stopped meanwhile.

        Raises PeerLostError if there are too few hosts for too long.
        """
        asked, told = _Asked(begun_s=time.monotonic()), ""
        while not is_stopped():
            try:
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
        self.leave()
        return None

    def _ask(self, asked: "_Asked") -> Round | str:
        """Returns the round, if it is decided and this host trains in it; else what this host waits for, if it knows.

        If it is for this host to decide, it does so.
        """
        # One that has trained looks at all decisions since then: the run may have ended. A new one begins with the next.
        asked.number = asked.number or (self._round.number + 1 if self._round.number else self._next_number())
        if (decided := self._decided(asked.number)) is not None:
            if decided.code is not None or self._host.index in decided.indices:
                self._delete_older(asked.number)
                return decided
            asked.number, asked.begun_s, asked.is_over = asked.number + 1, time.monotonic(), False
            return f"{decided}; this host waits until it is needed"
        self._write_ready(asked.number)
        seen = self._others(asked.number)
        present = {index: each for index, each in seen.items() if not each.has_left}
        present[self._host.index] = Ready(host=self._host, last_round=self._round.number)
        if min(present) < self._host.index or self._is_running(asked.number - 1, present):
            return ""
        if any(each.last_round for each in present.values()) and not asked.is_over:
            asked.is_over, asked.begun_s = True, time.monotonic()  # now the others of that round leave it
        waited_s = time.monotonic() - asked.begun_s
        if (hosts := self._due(present, seen.keys(), waited_s)) is not None:
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

    def look_at_round(self) -> tuple[bool, bool]:
        """Returns whether the round of this host is over, and whether this one asks for a round of more hosts."""
        number, hosts = self._round.number + 1, self._round.indices
        if self._host.index == hosts[0]:
            self._beat += 1
            self._files.write(_running_file(self._round.number), json.dumps({"beat": self._beat}).encode())
        others = self._others(number)
        is_over = any(index in hosts and not each.has_left for index, each in others.items())
        is_over = is_over or self._decided(number) is not None
        there = [index for index, each in others.items() if index not in hosts and not each.has_left]
        can_grow = len(self._bounds.chosen([*hosts, *there])) > len(hosts)
        return is_over, can_grow and self._host.index == hosts[0]

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
                each = Ready(**values | {"host": _host(values["host"])})
            except (ValueError, TypeError, KeyError, AttributeError):  # of another program, or a disk that was full
                continue
            is_other = 0 <= each.host.index < self._bounds.most and each.host.index != self._host.index
            if is_other and (self._signs.is_alive(name, each.beat) or each.has_left):
                found[each.host.index] = each
        return found

    def _write_ready(self, number: int, *, is_leaving: bool = False, has_left: bool = False) -> None:
        self._beat += 1
        last, beat = self._round.number, self._beat
        ready = Ready(host=self._host, last_round=last, is_leaving=is_leaving, has_left=has_left, beat=beat)
        self._files.write(f"ready-{number:06d}-{self._host.index}.json", json.dumps(asdict(ready)).encode())

    def _is_running(self, number: int, present: Mapping[int, Ready]) -> bool:
        """Whether a round trains, as far as those know that are there for the next one: none of them was in it."""
        if any(each.last_round == number > 0 for each in present.values()):
            return False
        try:
            beat = json.loads(self._files.read_or_none(_running_file(number)) or b"{}").get("beat")
        except (ValueError, AttributeError):
            return False
        name = _running_file(number)
        self._signs.look(-number, [name])
        # Until it was watched for long enough, it may train.
        return beat is not None and (self._signs.is_alive(name, beat) or not self._signs.is_watched(name))

    def _delete_older(self, number: int) -> None:
        """Deletes the files of earlier rounds but the decisions."""
        for name in self._files.list_names():
            if name.startswith(("ready-", "running-")) and 0 < _number(name) < number:
                self._files.delete(name)

    # Decisions

    def _due(self, present: Mapping[int, Ready], seen: Collection[int], waited_s: float) -> Sequence[int] | None:
        """Returns the hosts that train in the next round; None if others may still come.

        Nobody waits for hosts that were not in the last round, nor for those of `seen` that have left.
        """
        if any(each.is_leaving for each in present.values()):
            return None
        expected, limit_s = range(self._bounds.most), self._bounds.join_s
        if last := max(each.last_round for each in present.values()):
            before = self._decided(last)
            expected = before.indices if before else ()
            limit_s = max(self._bounds.wait_s, _DEAD_BEATS * self._beat_s)  # sooner nobody can know
        if {*expected} - {*seen} - present.keys() and waited_s < limit_s:
            return None
        return self._bounds.chosen([*present]) or None

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

    def _look(self) -> None:
        while not self._ended.wait(self._rendezvous.beat_s):
            if self.has_stepped and not self.is_over:
                self._ahead()
            try:
                if self.is_over:
                    self._rendezvous.say_leaving()
                else:
                    self.is_over, self.can_grow = self._rendezvous.look_at_round()
            except StorageError:  # away: the training itself finds out
                continue


@dataclass
class _Asked:
    """What a host waits for.

    Attributes:
        begun_s: since when it waits; once the last round is over, since it knows that.
        number: of the round; 0 if it does not know yet.
        is_over: whether a host of the last round is there.
    """

    begun_s: float
    number: int = 0
    is_over: bool = False


class _Signs:
    """Says by this host's clock which files show signs of life: those that change, and those that are new."""

    def __init__(self, dead_s: float) -> None:
        self._dead_s = dead_s
        self._seen: dict[str, tuple[int, float]] = {}  # the last beat of a file, and when it was first seen
        self._looked = set[int]()  # rounds whose files were looked for
        self._old: dict[str, float] = {}  # files that were there at the first look, and when that was

    def look(self, number: int, names: Sequence[str]) -> None:
        """Records what is there at the first look for a round: maybe what dead hosts have left."""
        if number not in self._looked:
            self._looked.add(number)
            self._old |= dict.fromkeys(names, time.monotonic())

    def is_alive(self, name: str, beat: int) -> bool:
        """Whether a file is new, or has changed lately."""
        now_s = time.monotonic()
        old, since_s = self._seen.get(name, (beat, -self._dead_s if name in self._old else now_s))
        if old != beat:
            since_s = now_s
        self._seen[name] = beat, since_s
        return now_s - since_s < self._dead_s

    def is_watched(self, name: str) -> bool:
        """Whether it was watched for long enough to say that it is dead."""
        return time.monotonic() - self._old.get(name, 0.0) >= self._dead_s


def _host(values: Any) -> Host:
    return Host(index=int(values["index"]), name=str(values["name"]), address=str(values["address"]))


def _round_file(number: int) -> str:
    return f"round-{number:06d}.json"


def _running_file(number: int) -> str:
    return f"running-{number:06d}.json"


def _number(name: str) -> int:
    """Returns the number of a round in the name of a file; 0 if there is none."""
    digits = name.removesuffix(".json").split("-")[1:2]
    return int(digits[0]) if digits and digits[0].isdecimal() else 0
