"""What is to run at a place, and the attempts to run it, which the run directory records: any machine can go on."""

import getpass
import json
import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from typing import Any

from jaxinfra.errors import ConfigError, DataError
from jaxinfra.launchers.places.bundle import short_hash
from jaxinfra.launchers.places.end_record import ENDED_FILE
from jaxinfra.launchers.places.place import PlaceOptions
from jaxinfra.launchers.places.run_files import RunFiles

ATTEMPT_FILE = "place/attempt-{attempt}.json"


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run at a place. It names secrets, and holds none."""

    location: str  # the run directory: a URL, or HOST:PATH
    command: Sequence[str]  # words after the Python
    folder: str  # below the top of the code, where the command was typed
    place: PlaceOptions
    bundle: str  # hash of the code
    packages: str = ""  # hash of Python and packages
    python: str = ""  # such as 3.13
    arch: str = ""  # of the hosts, as `uname -m` says it
    environment: Mapping[str, str] = field(default_factory=dict)  # of the processes, and of uv
    secrets: Sequence[str] = ()  # names of variables, whose values are those of whoever starts the hosts
    first: int = 1  # the attempt from which --max-hours counts: a start, or the one of `runs resume`

    @property
    def id(self) -> str:
        """The name of the run's folder on hosts."""
        return run_id(self.location)

    @property
    def is_elastic(self) -> bool:
        """Whether the run goes on without hosts that are lost."""
        return "--elastic" in self.command

    @property
    def uv_variables(self) -> dict[str, str]:
        """The variables of uv among those of the job, and what leads it through a proxy."""
        return {name: value for name, value in self.environment.items() if _INSTALLS.fullmatch(name)}

    def secret_values(self) -> dict[str, str]:
        """Returns the secrets of this process; raises ConfigError for those that are not set."""
        if missing := [name for name in self.secrets if name not in os.environ]:
            raise ConfigError(f"--secret {missing[0]}: not set here, and never recorded; export {missing[0]}=...")
        return {name: os.environ[name] for name in self.secrets}


def run_id(location: str) -> str:
    """Returns the name of a run's folder on hosts: that of the run, and a hash of where it is."""
    name = "".join(char if char.isalnum() or char in "-_." else "-" for char in location.rpartition("/")[2])
    return f"{name[:40]}-{short_hash(location.encode())[:10]}"


@dataclass(frozen=True, kw_only=True)
class Attempts:
    """The starts of a run at places, each a file that only one machine can make: nothing is started twice."""

    files: RunFiles
    location: str

    def newest(self) -> tuple[int, Job | None]:
        """Returns number and job of the last attempt; 0 and None before the first."""
        number, content = 0, None
        while (next_one := self.files.read_or_none(_attempt(number + 1))) is not None:
            number, content = number + 1, next_one
        return number, None if content is None else _parse(content, f"{self.location}/{_attempt(number)}")

    def claim(self, number: int, job: Job) -> tuple[Job, bool]:
        """Records an attempt; returns its job, and whether it is ours: another machine may have been faster."""
        content = json.dumps({"job": asdict(job), **_signature()}, indent=2).encode()
        if self.files.create(_attempt(number), content):
            return job, True
        found = self.files.read_or_none(_attempt(number))
        return _parse(found or b"", f"{self.location}/{_attempt(number)}"), False

    def ended(self, number: int) -> int | None:
        """Returns the exit code of an attempt that has ended, as its first host has recorded it; None if not."""
        content = self.files.read_or_none(ENDED_FILE.format(attempt=number))
        return None if content is None else int(json.loads(content)["code"])

    def stop(self, number: int) -> None:
        """Records that the user has stopped an attempt, so that no machine starts another one."""
        self.files.create(_stopped(number), json.dumps(_signature()).encode())

    def is_stopped(self, number: int) -> bool:
        """Returns whether the user has stopped an attempt."""
        return self.files.read_or_none(_stopped(number)) is not None

    def deadline(self, job: Job) -> float:
        """Returns when --max-hours are over, in seconds since the epoch; 0.0 is never. They begin at the first call."""
        if not job.place.max_hours:
            return 0.0
        name, ending = f"place/deadline-{job.first}", time.time() + 3600.0 * job.place.max_hours
        self.files.create(name, str(ending).encode())
        return float(self.files.read_or_none(name) or ending)

    def deadline_or_zero(self, job: Job) -> float:
        """Returns the deadline, 0.0 if there is none, or if the hours have not begun."""
        return float(self.files.read_or_none(f"place/deadline-{job.first}") or 0.0)

    def keep(self, kind: str, hash: str, content: bytes) -> None:
        """Stores what hosts need, by its hash, for machines that go on without the checkout."""
        self.files.create(f"place/{kind}-{hash}", content)

    def kept(self, kind: str, hash: str) -> bytes:
        """Returns what was stored; raises DataError if it is missing."""
        if (content := self.files.read_or_none(f"place/{kind}-{hash}")) is None:
            raise DataError(f"{self.location}/place/{kind}-{hash}: missing; start the run again by its config")
        return content


def _attempt(number: int) -> str:
    return ATTEMPT_FILE.format(attempt=number)


def _stopped(number: int) -> str:
    return f"place/stopped-{number}.json"


def _parse(content: bytes, where: str) -> Job:
    try:
        parsed: dict[str, Any] = json.loads(content)["job"]
        place = {**parsed.pop("place")}
        place |= {name: tuple(place.get(name, ())) for name in ("hosts", "sbatch", "volumes", "node_selector")}
        if unknown := [*(parsed.keys() - {f.name for f in fields(Job)}), *(place.keys() - _PLACE_FIELDS)]:
            raise ValueError(f"unknown field {unknown[0]}")
        return Job(**parsed, place=PlaceOptions(**place))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{where}: not the record of a start: {error}; start the run again by its config") from None


_INSTALLS = re.compile(r"UV_.*|SSL_CERT_(FILE|DIR)|(?i:.*_proxy)")
_PLACE_FIELDS = {each.name for each in fields(PlaceOptions)}


def _signature() -> dict[str, str | int]:
    """Returns who does something now: two machines never sign alike."""
    who = f"{getpass.getuser()}@{socket.gethostname()}"
    return {"by": who, "pid": os.getpid(), "clock": time.monotonic_ns(), "at": datetime.now(UTC).isoformat()}
