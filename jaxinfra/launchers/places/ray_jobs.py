"""Runs a job on a Ray cluster, through the client of Ray's Jobs API.

The job's driver (`cli.ray_driver`) starts lost workers again, whether anybody watches or not.
"""

import os
import re
import subprocess
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, override

from jaxinfra.errors import ConfigError, PeerLostError, StorageError
from jaxinfra.launchers.places.job import Attempts, Job
from jaxinfra.launchers.places.place import HostState, PlaceOptions, Say
from jaxinfra.launchers.places.ray_package import KILL_FILE, write_package
from jaxinfra.launchers.places.ray_submission import VARIABLES, address_of, submission, submission_id
from jaxinfra.launchers.places.run_files import files_of
from jaxinfra.launchers.places.scheduled import ScheduledPlace, ScheduledSource
from jaxinfra.launchers.restart_policy import INTERRUPTED
from jaxinfra.packages import import_optional, install_command

_TIMEOUT_S = 60.0  # of each part of an answer: the client itself waits for as long as the network does
_FIRST_TIMEOUT_S = 20.0
_EXTRA = "jaxinfra[ray]"


class RayJobs:
    """The jobs of one cluster; ConfigError for what Ray refuses, StorageError if it does not answer."""

    def __init__(self, address: str) -> None:
        """Connects nothing yet."""
        self.address, self._client = address, None
        self._ray = import_optional("ray", "job_submission", "exceptions", needed_by="--place ray", install=_EXTRA)
        self._requests = import_optional("requests", "exceptions", needed_by="--place ray", install=_EXTRA)

    def call(self, method: str, *arguments: object, **named: object) -> Any:
        """Calls a method of the client of Ray."""
        refused = (RuntimeError, ValueError, self._ray.exceptions.AuthenticationError)
        try:
            return getattr(self._client or self._connected(), method)(*arguments, **named)
        except (ConnectionError, self._requests.exceptions.RequestException) as error:
            fix = "is this the --address of its dashboard, and does this network reach it?"
            raise StorageError(f"{self.address}: no answer: {_line(error)}; {fix}") from None
        except refused as error:
            if re.search(r"status code 5\d\d\b", str(error)):  # such as while its head starts
                raise StorageError(f"{self.address}: {_line(error)}; look at `ray status` on the head node") from None
            raise ConfigError(f"{self.address}: {_line(error)}") from None

    def _connected(self) -> Any:
        # A server that answers anything is there; the client then says what is wrong with it.
        self._requests.get(f"{self.address}/api/version", timeout=_FIRST_TIMEOUT_S)
        os.environ[VARIABLES[0]] = self.address  # to the client a variable comes before its argument
        try:
            self._client = self._ray.job_submission.JobSubmissionClient(self.address)
        except RuntimeError as error:
            if "ray[default]" not in str(error):
                raise
            raise ConfigError(f"--place ray: needs the client of jobs; run {install_command(_EXTRA)}") from None
        self._client._do_request = partial(self._client._do_request, timeout=_TIMEOUT_S)
        return self._client

    def find(self, name: str) -> Any:
        """Returns what Ray knows of a job; None if it knows none of this name."""
        return next((each for each in self.call("list_jobs") if each.submission_id == name), None)


class RayCluster(ScheduledSource):
    """A Ray cluster that exists."""

    def __init__(self, options: PlaceOptions) -> None:
        """Takes the address of the environment where the options have none; raises ConfigError without any."""
        if not (address := address_of(options)):
            raise ConfigError(f"--place ray: which cluster? add --address http://HEAD:8265, or set {VARIABLES[1]}")
        super().__init__(replace(options, address=address), f"the Ray cluster at {address}")
        self.jobs = RayJobs(address)


class RayPlace(ScheduledPlace):
    """A run as one job of Ray."""

    def __init__(self, source: RayCluster, say: Say) -> None:
        """Connects nothing yet."""
        super().__init__(source, say)
        self._jobs, self._bundle = source.jobs, b""

    @property
    @override
    def started(self) -> str:
        return f"is a job of {self.hosts[0]}"

    @override
    def prepare(self, job: Job, *, go_on: Callable[[], bool] = lambda: True) -> Mapping[str, str]:
        """Asks the cluster for its jobs, to see that it answers."""
        self.hosts = self.source.current()
        self._jobs.call("list_jobs")
        return {"arch": ""}

    @override
    def ship(self, job: Job, attempts: Attempts) -> None:
        """Reads the code, which `start` sends along with secrets."""
        self._bundle = attempts.kept("bundle", job.bundle)

    @override
    def start(self, job: Job, number: int, *, left_s: float = 0.0) -> None:
        values = job.secret_values()
        if self._jobs.find(submission_id(job, number)) is None:
            with TemporaryDirectory(prefix="jaxinfra-ray-") as folder:
                package = Path(folder) / "code.zip"
                key = write_package(self._bundle, values, package)
                told = submission(job, number, working_dir=str(package), key=key, left_s=left_s)
                self._jobs.call("submit_job", **told)
        self._seen = number

    @override
    def _state(self, job: Job) -> HostState:
        prefix = f"{job.id}-"
        names = {each.submission_id: each for each in self._jobs.call("list_jobs") if each.submission_id}
        numbers = [int(name.removeprefix(prefix)) for name in names if re.fullmatch(f"{re.escape(prefix)}\\d+", name)]
        if not numbers:
            if not self._seen:
                return HostState(attempt=0, state="none")
            self._tell(f"{submission_id(job, self._seen)} is gone, as after a new start of the cluster")
            return HostState(attempt=self._seen, state="ended", code=PeerLostError.exit_code)
        number = self._seen = max(numbers)
        found = names[submission_id(job, number)]
        message = str(found.message or "").partition("\n")[0]
        self._tell(f"job {found.submission_id} is {found.status}{f': {message}' * bool(message)}")
        if not found.status.is_terminal():
            return HostState(attempt=number, state="live")
        return HostState(attempt=number, state="ended", code=_code(found))

    @override
    def stop(self, job: Job, number: int, *, signal: str = "TERM") -> None:
        """Asks the driver to let its workers save and leave; or has it leave at once."""
        if signal == "KILL":
            files_of(job.location).create(KILL_FILE.format(attempt=number), b"")
        if self._jobs.find(name := submission_id(job, number)) is not None:
            self._jobs.call("stop_job", name)

    @override
    def console(self, job: Job, *, rank: int = 0, lines: str = "+1", follow: bool) -> subprocess.Popen[bytes]:
        if not (number := self._seen or self._state(job).attempt):
            raise ConfigError(f"{job.location}: {self._jobs.address} has no job of this run yet; try again")
        words = self._jobs.address, submission_id(job, number), str(rank), lines
        return self._console("ray_log", *words, follow=follow)


def _code(job: Any) -> int:
    """Returns the exit code of a job that has ended."""
    if str(job.status) == "SUCCEEDED":
        return 0
    if str(job.status) == "STOPPED":
        return INTERRUPTED
    if str(job.error_type or "").endswith("RUNTIME_ENV_SETUP_FAILURE"):
        return ConfigError.exit_code
    code = job.driver_exit_code
    return code if code is not None and 0 < code < 128 else PeerLostError.exit_code


def _line(said: object) -> str:
    return textwrap.shorten(str(said), 600, placeholder=" ...")
