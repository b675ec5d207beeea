"""The rounds of an elastic run, and what its hosts tell one another of themselves. Imports no JAX."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import Any, Self

from jaxinfra.processes.connected_peers import SILENCE_S


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
    """Sign of life of a host that waits for a round.

    Attributes:
        host: which one.
        last_round: the last round that this supervisor has trained in; 0 if it has just begun.
        is_leaving: whether its processes of that round have not ended yet, or it waits before it starts them again.
        has_left: whether it has given up, or somebody has stopped it: it will not be there.
        beat: grows with each sign of life.
        supervisor: identifies the supervisor.
    """

    host: Host
    last_round: int
    supervisor: str
    is_leaving: bool = False
    has_left: bool = False
    beat: int = 0


@dataclass(frozen=True, kw_only=True)
class Running:
    """Sign of life of a host whose processes train.

    Attributes:
        beat: grows with each sign of life.
        supervisor: identifies it.
        has_ended: whether its processes have ended.
    """

    beat: int
    supervisor: str
    has_ended: bool = False


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
        values |= {"hosts": [parse_host(each) for each in values["hosts"]]}
        return cls(**{each.name: values[each.name] for each in fields(cls)})


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Limits of the number of hosts, and of waits for them.

    Attributes:
        least: the fewest hosts.
        most: the most; their indices are below it.
        together: hosts that train together or not at all, such as those of a slice of TPUs; index // together says
            which ones.
        overrides: of the config, by each number of hosts that it trains on.
        wait_s: time that a host gets to come back.
        join_s: time that all hosts get at the first start.
        silence_s: silence after which the supervisor of a host that trains counts as lost.
    """

    least: int
    most: int
    together: int = 1
    overrides: Mapping[int, Sequence[str]]
    wait_s: float
    join_s: float
    silence_s: float = SILENCE_S

    def chosen(self, present: Sequence[int], before: Collection[int] = ()) -> Sequence[int]:
        """Returns the hosts that train, of those that are there: as many as the run can be divided among.

        Those that trained `before` come first: they have copies of the state, and compiled programs.
        """
        groups: dict[int, list[int]] = {}
        for index in sorted(present):
            groups.setdefault(index // self.together, []).append(index)
        whole = [group for group in groups.values() if len(group) == self.together]
        whole.sort(key=lambda group: not {*group} <= {*before})
        indices = [index for group in whole for index in group]
        fitting = [n for n in self.overrides if self.least <= n <= len(indices) and n % self.together == 0]
        return sorted(indices[: max(fitting, default=0)])


def parse_host(values: Any) -> Host:
    """Returns a host from JSON; raises ValueError, TypeError or KeyError for what is none."""
    return Host(index=int(values["index"]), name=str(values["name"]), address=str(values["address"]))
