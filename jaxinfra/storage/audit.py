"""An append-only record of what was done to models and data; each entry holds the hash of the one before it.

Entries are files 00000001.json, 00000002.json, ... in a folder or bucket prefix. Each is created with a conditional
write, as the files of a lease are, so that of two that append at once one comes after the other, on any host. A changed
entry does not fit to the hash in the next one, and a missing one leaves a gap. Entries that are cut off at the end
leave no trace here: keep the hash of the newest one, which every command prints, or lock the objects in the bucket.
"""

import getpass
import hashlib
import json
import re
import socket
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from jaxinfra.errors import ConfigError, DataError
from jaxinfra.storage.location import is_remote
from jaxinfra.storage.shared_files import SharedFiles, shared_files

_NAME = re.compile(r"(\d{8})\.json")
_FIRST = "0" * 64


class Entry(NamedTuple):
    """One action on record; `digest` is the SHA-256 of its file, in hexadecimal digits."""

    number: int
    digest: str
    time: str
    who: str
    action: str
    subject: str
    details: Mapping[str, Any]


def append(where: str, action: str, subject: str, **details: Any) -> Entry:
    """Appends an entry: "trained", "promoted", "exported" or "forgot", and the run, model or store that it is about.

    Raises StorageError if the place cannot be written, DataError if its newest entry is damaged.
    """
    files = _files(where)
    while True:
        number = max(map(_number, files.list_names()), default=0)
        previous = _FIRST if number == 0 else _parse(where, number, files.read_or_none(_name(number)))[0].digest
        try:
            who = f"{getpass.getuser()}@{socket.gethostname()}"
        except (OSError, KeyError):  # a user without a name, as in many containers
            who = socket.gethostname()
        now = datetime.now(UTC).isoformat(timespec="seconds")
        # Two that write the same in one second have not written one entry: a bucket takes an equal object for a retry.
        content = {"id": uuid.uuid4().hex, "previous": previous, "time": now, "who": who, "action": action}
        content |= {"subject": subject, "details": details}
        encoded = json.dumps(content, sort_keys=True).encode() + b"\n"
        if files.create(_name(number + 1), encoded):
            return _parse(where, number + 1, encoded)[0]


def verify(where: str) -> Sequence[Entry]:
    """Returns the entries of a record as `read_entries`; raises ConfigError if it has none."""
    if not (entries := read_entries(where)):
        raise ConfigError(f"{where}: has no entries; name what track.audit of a run names, such as runs/audit")
    return entries


def read_entries(where: str) -> Sequence[Entry]:
    """Returns all entries, oldest first; raises DataError for the first one that is missing, damaged or changed."""
    files, entries, previous = _files(where), list[Entry](), _FIRST
    newest = max(map(_number, files.list_names()), default=0)
    for number in range(1, newest + 1):
        entry, named = _parse(where, number, files.read_or_none(_name(number)))
        if named != previous:
            before = f"follows on another {_name(number - 1)}" if number > 1 else "is not the first"
            changed = f"{_name(number)} {before}"
            raise DataError(f"{where}: {changed}: one of them was changed or exchanged; compare with a copy")
        entries.append(entry)
        previous = entry.digest
    return entries


def _files(where: str) -> SharedFiles:
    parent, _, name = where.rstrip("/").rpartition("/")
    if is_remote(where) and parent.endswith(("s3:/", "gs:/")):
        raise ConfigError(f"{where}: expected a folder below the bucket; use {where.rstrip('/')}/audit")
    return shared_files(parent or ("/" if where.startswith("/") else "."), name)


def _name(number: int) -> str:
    return f"{number:08d}.json"


def _number(name: str) -> int:
    found = _NAME.fullmatch(name)
    return int(found[1]) if found else 0


def _parse(where: str, number: int, content: bytes | None) -> tuple[Entry, str]:
    """Returns an entry, and the hash of the one before it."""
    if content is None:
        raise DataError(f"{where}: {_name(number)} is missing, and later entries are there; restore it from a copy")
    try:
        values = json.loads(content)
        time, who, action, subject = (str(values[name]) for name in ("time", "who", "action", "subject"))
        digest = hashlib.sha256(content).hexdigest()
        return Entry(number, digest, time, who, action, subject, values["details"]), values["previous"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DataError(f"{where}: {_name(number)} is damaged; restore it from a copy") from None
