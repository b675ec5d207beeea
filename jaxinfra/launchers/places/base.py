"""The verbs of a place: what the controller asks of hosts that ssh reaches, of Slurm, and of Kubernetes."""

import subprocess
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from jaxinfra.launchers.places.job import Attempts, Job
from jaxinfra.launchers.places.place import Host, HostSource, HostState, Say


class Place(ABC):
    """Prepares, ships, starts, watches, stops and removes a run."""

    poll_s: ClassVar[float] = 2.0
    """Seconds between two questions to the hosts."""
    installs: ClassVar[bool] = True
    """Whether hosts get a Python and packages; else an image has them."""

    def __init__(self, source: HostSource, say: Say) -> None:
        """`source` says which hosts; nothing is connected yet."""
        self.source, self._say = source, say
        self.hosts: Sequence[Host] = ()

    @property
    @abstractmethod
    def started(self) -> str:
        """Where a start runs, for people."""

    @abstractmethod
    def prepare(self, job: Job, *, go_on: Callable[[], bool] = lambda: True) -> Mapping[str, str]:
        """Finds or makes the hosts, checks them, and returns facts of the first. Nothing is started yet.

        `go_on` says whether to go on waiting. Raises an error that names all that is wrong.
        """

    def extras(self, job: Job) -> Sequence[str]:
        """Returns the extras of jaxinfra for the chips of the hosts; () if they are not known."""
        return ()

    @abstractmethod
    def ship(self, job: Job, attempts: Attempts) -> None:
        """Brings what is needed for a start to the hosts that lack it."""

    @abstractmethod
    def start(self, job: Job, number: int, *, left_s: float = 0.0) -> None:
        """Starts an attempt; does nothing where it has been started.

        `left_s` are the seconds until the deadline, 0 for none.
        """

    @abstractmethod
    def watch(self, job: Job) -> Mapping[Host, HostState]:
        """Returns what each host says now."""

    @abstractmethod
    def console(self, job: Job, *, rank: int = 0, lines: str = "+1", follow: bool) -> subprocess.Popen[bytes]:
        """Starts to show what a rank has printed: `lines` as of `tail -n`; `follow` until it ends."""

    @abstractmethod
    def ranks(self, job: Job) -> int:
        """Returns the number of processes."""

    @abstractmethod
    def stop(self, job: Job, number: int, *, signal: str = "TERM") -> None:
        """Asks an attempt to save and leave, or kills it; other attempts are left alone."""

    def remove(self) -> None:
        """Deletes what was made for the run; on hosts that stay, code, packages and consoles stay."""
        self.source.release(self._say)
