"""A lease on a folder or bucket prefix: it has one owner at a time, across hosts and file systems.

The lease is the file `lease/N.json`. N is its fencing token, which grows with every owner. A process takes the lease by
creating the file of the next number, which succeeds for one process alone: with a conditional write in a bucket, with a
hard link on a disk (`flock` does not hold on NFS and Lustre). The owner rewrites its file every `BEAT_S` seconds.

A lease ends when its owner releases it, when a process on the owner's host sees that the owner is dead, or when another
process has seen no beat for `EXPIRY_S` seconds. Each process measures that time itself, so clocks may differ.

An owner that was stopped or cut off may not know that it has lost the lease. So whoever publishes something must do it
in a way that fails for an older token; `Lease.check` alone leaves a gap between the check and the write.

A damaged file, or a folder or pipe in its place, counts as that of an owner without a name: it is waited out, and the
next token is larger. Files with other names are left alone.
"""

import json
import logging
import os
import re
import socket
import threading
import time
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Self

from jaxinfra.errors import JaxinfraError, RunInUseError, StorageError
from jaxinfra.storage.shared_files import SharedFiles, SharedFolder, shared_files

BEAT_S = 5.0
"""Seconds between two beats of an owner."""
EXPIRY_S = 30.0
"""Seconds without a beat after which another process may take the lease."""

_FOLDER = "lease"
_POLL_S = 1.0
_FILE = re.compile(r"([0-9]{8}|[1-9][0-9]{8,})\.json")
_MAX_CHARS = 300  # of a value in the file of a lease

_log = logging.getLogger(__name__)
_held: set[str] = set()  # the ids of the leases that this process holds


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The holder of a lease, as its file says."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex)  # of this lease; no other has the same
    host: str  # name of its host; "" if its file is damaged
    pid: int  # its process id
    identity: str  # with the pid, identifies the process for all time, see `_process_identity`; "" if that is unknown
    since: str  # when it took the lease, in UTC by its own clock; for people only
    renewed: str  # when it renewed the lease last, in UTC by its own clock; a hint for people, no lease ends by it
    round: int = 0  # the start of an elastic run that it belongs to, counted from 1; 0 for other runs
    beat: int = 0  # number of times that it has renewed the lease
    released: bool = False  # whether it has given the lease back

    @classmethod
    def this_process(cls, round_number: int = 0) -> Self:
        """Returns this process as an owner."""
        pid, host, now = os.getpid(), socket.gethostname(), _utc_now()
        return cls(host=host, pid=pid, identity=_process_identity(pid), since=now, renewed=now, round=round_number)

    @classmethod
    def of_damaged(cls, content: bytes) -> Self:
        """Returns what stands for the owner whose file is damaged; a change of the content counts as a sign of life."""
        return cls(id="", host="", pid=0, identity="", since="", renewed="", beat=zlib.crc32(content))

    @property
    def state(self) -> Literal["holds", "ended", "unknown"]:
        """Whether it holds the lease still; "unknown" if it may run on another host."""
        system, _, start = self.identity.rpartition("/")  # the system is its boot and its process namespace
        own = _process_identity(os.getpid())
        if self.released:
            return "ended"
        if not start or system != own.rpartition("/")[0]:
            return "unknown"
        if self.pid == os.getpid() and self.identity == own:  # maybe by an earlier lease, which it could not release
            return "holds" if self.id in _held else "ended"
        return "holds" if _process_identity(self.pid) == self.identity else "ended"

    @property
    def age_s(self) -> float:
        """Seconds since it renewed the lease, as far as the clocks of its host and of this one agree."""
        return time.time() - datetime.fromisoformat(self.renewed).timestamp() if self.renewed else float("inf")

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}" if self.host else "an owner with a damaged file"


class Lease:
    """A lease that this process holds; `hold` takes and releases it.

    Attributes:
        token: its fencing token, larger than that of every earlier owner.
    """

    def __init__(self, objects: SharedFiles, where: str, token: int, owner: Owner, beat_s: float) -> None:
        self.token = token
        self._objects, self._where, self._owner, self._beat_s = objects, where, owner, beat_s
        self._lost: Exception | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises RunInUseError if this process is known to have lost the lease; accesses no storage."""
        if self._lost is not None:
            raise self._lost

    def check_now(self) -> None:
        """Raises RunInUseError if this process holds the lease no longer; StorageError if that cannot be found out."""
        self.check()
        newest = _newest(self._objects)
        if newest is not None and newest[0] > self.token:
            self._lost = RunInUseError(
                f"{self._where}: {newest[1]}, has taken over this run while this process was stopped or cut off; "
                "leave the run to it"
            )
        elif (newest is None or newest[0] < self.token) and self._objects.read_or_none(_file_name(self.token)) is None:
            # Another process may have begun anew, with a smaller token. A listing may lack a file while it is replaced.
            self._lost = RunInUseError(
                f"{self._where}: the file of this run's lease, {_FOLDER}/{_file_name(self.token)}, was deleted, so "
                "another process may train the run; start the same command again if none does"
            )
        self.check()

    def release(self) -> None:
        """Gives the lease back; a storage failure is only logged, since the lease then ends by itself."""
        self._ended.set()
        self._thread.join()
        if self._lost is not None:
            return
        try:
            with suppress(StorageError):  # then the write is tried, and its failure is logged
                self.check_now()
            self._objects.write(_file_name(self.token), _encode(replace(self._owner, released=True)))
        except JaxinfraError as error:
            _log.warning("%s", error)

    def _beat(self) -> None:
        while not self._ended.wait(self._beat_s):
            try:
                self.check_now()
                self._owner = replace(self._owner, beat=self._owner.beat + 1, renewed=_utc_now())
                self._objects.write(_file_name(self.token), _encode(self._owner))
            except StorageError:  # away, for this host at least: the next beat finds out what has happened
                continue
            except Exception as error:  # `check` raises it in the main thread
                self._lost = error
                return


@contextmanager
def hold(
    where: str | Path,
    *,
    after: int = 0,
    round_number: int = 0,
    beat_s: float = BEAT_S,
    expiry_s: float = EXPIRY_S,
    busy: str = "is training this run; wait for it, or use name=ANOTHER",
) -> Iterator[Lease]:
    """Takes the lease on a folder or URL within this context.

    Waits up to `expiry_s` for the lease of an owner that may be dead. Raises RunInUseError, which names the owner, if
    that lives, and StorageError if the storage cannot be read or written.

    Args:
        where: the folder or URL.
        after: a token that an earlier owner is known to have had; the files of the lease may have been deleted.
        round_number: the start of an elastic run. An owner of an earlier one is not waited for: the hosts have agreed
            to go on without it.
        beat_s: seconds between two beats.
        expiry_s: seconds without a beat after which a lease ends.
        busy: what the owner does, and what to do about it, for the message.
    """
    me = Owner.this_process(round_number)
    _held.add(me.id)
    try:
        lease = _acquire(str(where), me, after=after, beat_s=beat_s, expiry_s=expiry_s, busy=busy)
        try:
            yield lease
        finally:
            lease.release()
    finally:
        _held.discard(me.id)


def current_owner(where: str | Path) -> Owner | None:
    """Returns the process that holds a lease, as far as one look can tell; None if nobody does.

    An owner on another host counts if it has renewed its lease within the last `EXPIRY_S`, by the clocks of both hosts.
    """
    newest = _newest(shared_files(str(where), _FOLDER))
    if newest is None or newest[1].state == "ended":
        return None
    owner = newest[1]
    return owner if owner.state == "holds" or owner.age_s < EXPIRY_S else None


def _acquire(where: str, me: Owner, *, after: int, beat_s: float, expiry_s: float, busy: str) -> Lease:
    objects = shared_files(where, _FOLDER)
    seen: tuple[int, Owner] | None = None  # what this process has first seen, and when
    seen_s = time.monotonic()
    while True:
        newest = _newest(objects)
        is_expired = newest == seen and time.monotonic() - seen_s > expiry_s
        is_over = newest is not None and 0 < newest[1].round < me.round
        if newest is None or newest[1].state == "ended" or is_expired or is_over:
            token = max(after, 0 if newest is None else newest[0]) + 1
            if objects.create(_file_name(token), _encode(me)):
                _delete_older(objects, token)
                return Lease(objects, where, token, me, beat_s)
            continue
        _, owner = newest
        if owner.state == "holds" or (seen is not None and newest != seen):
            raise RunInUseError(f"{where}: {owner}, {busy}")
        if seen is None:
            seen, seen_s = newest, time.monotonic()
            _log.warning("%s: held by %s; waiting up to %.0f s for a sign of life", where, owner, expiry_s)
        time.sleep(min(_POLL_S, expiry_s / 4))


def _utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _process_identity(pid: int) -> str:
    """Returns boot, process namespace and start time of a running process; "" if there is none, or no /proc."""
    try:
        # After the name, in parentheses, the state is the first field and the start time the 20th.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else f"{boot}/{namespace}/{fields[19]}"


def _newest(objects: SharedFiles) -> tuple[int, Owner] | None:
    """Returns token and owner of the newest lease; None if there was never one."""
    missing = 0
    while token := max(map(_token, objects.list_names()), default=0):
        content = objects.read_or_none(_file_name(token))
        if content is not None or token == missing:  # a listing may have a deleted file for a minute: it is damaged
            return token, _parse(content or b"")
        missing = token  # probably deleted by a newer owner since it was listed: list again
    return None


def _delete_older(objects: SharedFiles, token: int) -> None:
    """Deletes the files of earlier owners."""
    for name in objects.list_names():
        if 0 < _token(name) < token:
            objects.delete(name)
    if isinstance(objects, SharedFolder):
        objects.delete_temporaries(lambda name: 0 < _token(name) < token)


def _file_name(token: int) -> str:
    return f"{token:08d}.json"


def _token(name: str) -> int:
    """Returns the token in the name of a file; 0 if it is no file of a lease."""
    found = _FILE.fullmatch(name)
    return int(found[1]) if found else 0


def _encode(owner: Owner) -> bytes:
    return json.dumps(asdict(owner)).encode() + b"\n"


def _parse(content: bytes) -> Owner:
    kinds = {each.name: each.type for each in fields(Owner)}
    try:
        values = {"round": 0, **json.loads(content)}  # an earlier version writes none
        owner = Owner(**{name: values[name] for name in kinds})  # a later version may write more
        datetime.fromisoformat(owner.renewed).timestamp()
        has_types = all(type(values[name]) is kind for name, kind in kinds.items())
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return Owner.of_damaged(content)
    texts = [str(values[name]) for name in kinds]
    is_sound = has_types and all(len(each) <= _MAX_CHARS and each.isprintable() for each in texts)
    return owner if is_sound else Owner.of_damaged(content)
