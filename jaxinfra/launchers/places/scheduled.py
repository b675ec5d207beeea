"""Shares what Kubernetes and Ray need: an existing cluster runs the job, and its news of the job are passed on."""

import subprocess
import sys
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import override

from jaxinfra.errors import StorageError
from jaxinfra.launchers.places.base import Place
from jaxinfra.launchers.places.job import Job
from jaxinfra.launchers.places.manifests import pods_of
from jaxinfra.launchers.places.place import Host, HostSource, HostState, PlaceOptions, Say


class ScheduledSource(HostSource):
    """A cluster as the only host. Nothing is made or deleted but what runs the job."""

    def __init__(self, options: PlaceOptions, name: str) -> None:
        """Takes the options, with all that the environment has added, and the cluster's name for people."""
        self.options, self._host = options, Host(address="", name=name)

    @override
    def current(self) -> Sequence[Host]:
        return [self._host]

    @override
    def release(self, say: Say) -> None:
        """Does nothing: a job that has ended holds nothing but its logs."""


class ScheduledPlace(Place):
    """A run as one job of a cluster, which has a worker for each host of `--accelerator`."""

    installs = False

    def __init__(self, source: HostSource, say: Say) -> None:
        """Connects nothing yet."""
        super().__init__(source, say)
        self._told, self._seen = "", 0  # the last line, and the newest attempt

    @override
    def watch(self, job: Job) -> Mapping[Host, HostState]:
        """Returns the state of the job; says when it changes, such as why it waits."""
        host = self.hosts[0]
        try:
            return {host: self._state(job)}
        except StorageError as error:
            self._tell(str(error))
            return {host: HostState(attempt=0, state="away")}

    @abstractmethod
    def _state(self, job: Job) -> HostState:
        """Asks the cluster for the state of the newest attempt; raises StorageError if it does not answer."""

    def _tell(self, text: str) -> None:
        if text != self._told:
            self._told = text
            self._say(text)

    @staticmethod
    def _console(module: str, *words: str, follow: bool) -> subprocess.Popen[bytes]:
        """Starts a module of this package that prints what a rank has printed."""
        command = [sys.executable, "-m", f"{__package__}.{module}", *words, "yes" if follow else "no"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)

    @override
    def ranks(self, job: Job) -> int:
        return pods_of(job.place).count
