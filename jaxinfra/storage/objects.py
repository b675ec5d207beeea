"""Places that hold named objects, all through TensorStore: a folder, `s3://bucket/prefix`, `gs://bucket/prefix`.

It knows nothing of what the objects are. Invariants: an object is there whole or not at all; whoever cannot
reach the place fails within the budget for retries, in one line that names the URL; no credential is taken from
a URL or shown in a message.

Credentials come from the environment or a profile, as the tools of each cloud take them. `AWS_ENDPOINT_URL_S3`
or `AWS_ENDPOINT_URL` and `AWS_REGION` or `AWS_DEFAULT_REGION` lead to other servers of S3's protocol;
`TENSORSTORE_GCS_HTTP_URL` does for Google's. At most 32 requests are under way at once
(`TENSORSTORE_S3_REQUEST_CONCURRENCY`, `TENSORSTORE_GCS_REQUEST_CONCURRENCY`).
"""

import os
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import tensorstore as ts

from jaxinfra.errors import ConfigError, DataError, JaxinfraError, StorageError

RETRY_S = 60.0
"""How long a failing request is tried again: a minute of waiting between a dozen tries."""
RETRY_VARIABLE = "JAXINFRA_STORAGE_RETRY_S"
"""Of the environment: another time in seconds."""
IN_FLIGHT_BYTES = 256 * 1024 * 1024
"""An upload holds so much in memory, or one file if that is larger."""
REMAKE = "move this version away, then prepare it again or copy it anew"
"""What to do about a damaged version: nothing is written over one that is there."""

_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 8.0
_END_BYTES = 256
_DRIVERS = {"s3": "s3", "gs": "gcs"}
_SECRET_LENGTH = 8  # at least; what is shorter is found in words
_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "GOOGLE_AUTH_TOKEN_FOR_TESTING")
# TensorStore takes these from the environment alone, and without them waits for a silent server for ever.
_PATIENCE = {
    "TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS": "10",
    "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "20",
    "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "1",
}
_NO_ACCESS = (
    "ABORTED",
    "DEADLINE_EXCEEDED",
    "INTERNAL",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "UNAUTHENTICATED",
    "UNAVAILABLE",
)
_NO_BUCKET = re.compile("NoSuchBucket|bucket does not exist")


def check_url(url: str) -> str:
    """The URL without what does not belong to it: a slash at its end, `~`, `file://`.

    Raises:
        ConfigError: it is of no kind that is known, or has credentials or a query in it; they are not shown.
    """
    if "://" not in url:
        return str(Path(url).expanduser().absolute())
    parts = urlsplit(url)
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")
    elsewhere = parts.scheme != "file"
    if "@" in parts.netloc or (elsewhere and ":" in parts.netloc) or parts.query or parts.fragment:
        raise ConfigError(
            f"{shown}: the URL of a store must not have credentials, a query or a fragment in it; "
            "give credentials by the environment or a profile"
        )
    if parts.scheme == "file":
        return str(Path(parts.path).absolute())
    if parts.scheme not in _DRIVERS or not parts.netloc:
        raise ConfigError(f"{shown}: not a place for a store; give a folder, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX")
    return shown


def context(*, retry_s: float | None = None, cache_bytes: int = 0) -> ts.Context:
    """What all that is opened with the same arguments shares: a cache, and how often a request is tried again.

    Raises:
        ConfigError: the environment has a time that is none.
    """
    if retry_s is None:
        text = os.environ.get(RETRY_VARIABLE, str(RETRY_S))
        try:
            retry_s = float(text)
            if not 0 < retry_s <= 24 * 3600:
                raise ValueError
        except ValueError:
            fix = f"use {RETRY_VARIABLE}={RETRY_S:.0f}"
            raise ConfigError(f"{RETRY_VARIABLE}={text}: expected seconds, above 0 and up to a day; {fix}") from None
    return _context(retry_s, cache_bytes)


@cache
def _context(retry_s: float, cache_bytes: int) -> ts.Context:
    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)
    waits = [min(_FIRST_WAIT_S, retry_s / 32)]
    while sum(waits) < retry_s:
        waits.append(min(2 * waits[-1], _LONGEST_WAIT_S))
    retries = {
        "max_retries": len(waits),
        "initial_delay": f"{waits[0]}s",
        "max_delay": f"{_LONGEST_WAIT_S}s",
    }
    cache_pool = {"total_bytes_limit": cache_bytes}
    return ts.Context({"cache_pool": cache_pool, "s3_request_retries": retries, "gcs_request_retries": retries})


def kvstore_spec(url: str) -> dict[str, Any]:
    """How TensorStore opens a place; `url` as `check_url` gives it."""
    if "://" not in url:
        return {"driver": "file", "path": f"{url}/"}
    parts = urlsplit(url)
    path = parts.path.strip("/")
    spec: dict[str, Any] = {
        "driver": _DRIVERS[parts.scheme],
        "bucket": parts.netloc,
        "path": f"{path}/" if path else "",
    }
    return spec | _s3_settings() if parts.scheme == "s3" else spec


def _s3_settings() -> dict[str, Any]:
    """What the tools of AWS take from the environment and TensorStore does not, or not as quietly."""
    settings: dict[str, Any] = {}
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        if "@" in endpoint:
            raise ConfigError("AWS_ENDPOINT_URL: has credentials in it; give them by AWS_ACCESS_KEY_ID or a profile")
        settings["endpoint"] = endpoint
        if region := os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
            settings["aws_region"] = region
    if "AWS_ACCESS_KEY_ID" in os.environ:
        # Else profiles are looked for first, and that they are not there is complained of on stderr.
        settings["aws_credentials"] = {"type": "environment"}
    else:
        # TensorStore looks for a profile of no name, whatever AWS_PROFILE says (0.1.86).
        settings["aws_credentials"] = {"type": "default", "profile": os.environ.get("AWS_PROFILE") or "default"}
    return settings


def checked[T](where: str, call: Callable[[], T], *, writing: bool = False) -> T:
    """Runs a call of TensorStore or of the file system; its errors become those of this project.

    Raises:
        DataError: what was to be read is missing or damaged.
        StorageError: the place may not or cannot be read or written.
    """
    try:
        return call()
    except (ValueError, OSError) as error:
        raise _translate(where, error, writing) from None


class Storage:
    """One place; safe to use from many threads."""

    def __init__(self, url: str | Path, *, retry_s: float | None = None):
        """Looks at the URL; nothing is asked of the place itself.

        Args:
            url: a folder, `s3://bucket/prefix` or `gs://bucket/prefix`.
            retry_s: how long a failing request is tried again, about; None is as the environment says, or `RETRY_S`.

        Raises:
            ConfigError: the URL is of no kind that is known, or has credentials in it.
        """
        self.url = check_url(str(url))
        spec = kvstore_spec(self.url)
        try:
            self._objects = ts.KvStore.open(spec, context=context(retry_s=retry_s)).result()
        except ValueError as error:
            raise ConfigError(f"{self.url}: {error}; give a folder, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX") from None

    def where(self, name: str) -> str:
        """The URL of an object: for messages, and for arrays."""
        return f"{self.url}/{name}"

    def child(self, name: str) -> "Storage":
        """The place of that name below this one."""
        child = object.__new__(Storage)
        child.url = self.where(name)
        child._objects = self._objects.copy()
        child._objects.path = f"{self._objects.path}{name}/"
        return child

    def read(self, name: str) -> bytes:
        """A whole object.

        Raises:
            DataError: it is missing.
            StorageError: the place cannot be read.
        """
        found = checked(self.where(name), self._objects.read(name).result)
        if found.state != "value":
            self._listed(name)
            raise DataError(f"{self.where(name)}: missing; {REMAKE}")
        return found.value

    def exists(self, name: str) -> bool:
        """Whether there is an object of that name.

        Raises:
            StorageError: the place cannot be read, or the server says that there is no such bucket.
        """
        found = checked(self.where(name), self._objects.read(name, byte_range=slice(0, 0)).result)
        return found.state == "value" or self._listed(name)

    def names(self) -> list[str]:
        """All objects at and below this place, by their names relative to it, sorted."""
        return sorted(name.decode() for name in checked(self.url, self._objects.list().result))

    def check(self, sizes: Mapping[str, int]) -> None:
        """Looks whether objects are there and as long as they should be; of each, one byte is read.

        Args:
            sizes: bytes that each should have.

        Raises:
            DataError: one is missing, shorter or longer.
            StorageError: the place cannot be read.
        """
        for read in [self._ask_end(name, size_bytes, 1) for name, size_bytes in sizes.items()]:
            read()

    def write(self, name: str, content: bytes) -> None:
        """Writes an object: who reads it finds all of it or, as before, nothing of it.

        Raises:
            StorageError: it cannot be written.
        """
        checked(self.where(name), self._objects.write(name, content).result, writing=True)

    def update(self, name: str, change: Callable[[bytes | None], bytes]) -> None:
        """Replaces an object by what is made of it; when another process was faster, that is changed in its turn.

        Args:
            name: of the object.
            change: from what is there, None if nothing is, to what shall be there. It may be called again, and on what
                it made itself, if the answer to a write is lost.

        Raises:
            StorageError: it cannot be read or written.
        """
        while True:
            found = checked(self.where(name), self._objects.read(name).result)
            content = change(found.value if found.state == "value" else None)
            write = self._objects.write(name, content, if_equal=found.stamp.generation)
            if checked(self.where(name), write.result, writing=True).generation:
                return

    def delete(self, name: str) -> None:
        """Removes an object, if there is one."""
        checked(self.where(name), self._objects.write(name, None).result, writing=True)

    def upload(self, folder: Path, *, last: Sequence[str] = (), resume: bool = False) -> None:
        """Copies all files of a local folder, many at once, and looks whether each has arrived.

        Args:
            folder: files are named relative to it.
            last: names that are written when all others have arrived, in this order: who sees them sees all.
            resume: whether what is there with the same length and end need not be written again; for places that
                are named by what is in them.

        Raises:
            StorageError: a file cannot be read or written, or is not there after it was written.
        """
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        ends = {name: checked(str(path), lambda path=path: _end_of(path), writing=True) for name, path in files.items()}
        there = set(self.names()) & files.keys() if resume else set()
        done = {*self._arrived({name: ends[name] for name in there}), *last}
        self._send({name: path for name, path in sorted(files.items()) if name not in done}, ends)
        for name in last:
            self._send({name: files[name]}, ends)

    def _listed(self, name: str) -> bool:
        """Whether a listing has the name; that there is no such bucket, S3 says in a listing alone."""
        alone = ts.KvStore.KeyRange(name, f"{name}\0")
        return bool(checked(self.where(name), self._objects.list(alone).result))

    def _send(self, files: Mapping[str, Path], ends: Mapping[str, "_End"]) -> None:
        writes: deque[tuple[str, int, ts.Future]] = deque()
        in_flight_bytes = 0
        for name, path in files.items():
            content = checked(str(path), path.read_bytes, writing=True)
            in_flight_bytes += len(content)
            while writes and in_flight_bytes > IN_FLIGHT_BYTES:
                written, size_bytes, future = writes.popleft()
                checked(self.where(written), future.result, writing=True)
                in_flight_bytes -= size_bytes
            writes.append((name, len(content), self._objects.write(name, content)))
        for name, _, future in writes:
            checked(self.where(name), future.result, writing=True)
        if lost := sorted(files.keys() - self._arrived({name: ends[name] for name in files})):
            raise StorageError(
                f"{self.where(lost[0])}: is not what was written a moment ago; nothing was made of it: try again, and "
                "see who else writes there"
            )

    def _arrived(self, ends: Mapping[str, "_End"]) -> set[str]:
        """Which objects are as long as they should be and end as they should."""
        reads = [(name, self._ask_end(name, end.size_bytes, len(end.content))) for name, end in ends.items()]
        arrived = set[str]()
        for name, read in reads:
            try:
                arrived |= {name} if read() == ends[name].content else set()
            except DataError:
                continue  # it is missing, or of another length
        return arrived

    def _ask_end(self, name: str, size_bytes: int, at_most: int) -> Callable[[], bytes]:
        """Asks for the last bytes of an object: what is returned waits for them, and fails if it has another length."""
        start = max(0, size_bytes - at_most)
        future = self._objects.read(name, byte_range=slice(start, None) if start else None)
        where = self.where(name)

        def read() -> bytes:
            try:
                found = future.result()
            except ValueError as error:
                if str(error).startswith("OUT_OF_RANGE"):
                    raise DataError(f"{where}: fewer than {size_bytes} bytes; {REMAKE}") from None
                raise _translate(where, error, writing=False) from None
            if found.state != "value":
                raise DataError(f"{where}: missing; {REMAKE}")
            if (n_bytes := start + len(found.value)) != size_bytes:
                raise DataError(f"{where}: {n_bytes} bytes, not {size_bytes}; {REMAKE}")
            return found.value

        return read


@dataclass(frozen=True, kw_only=True)
class _End:
    """How long a file is, and its last bytes."""

    size_bytes: int
    content: bytes


def _end_of(path: Path) -> _End:
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size_bytes - _END_BYTES))
        return _End(size_bytes=size_bytes, content=file.read())


def _translate(where: str, error: Exception, writing: bool) -> JaxinfraError:
    """Errors of TensorStore start with an absl status code; notes in brackets follow, of the server's answer, too."""
    text = " ".join(str(error).split())
    cause = text.split(" [")[0].removesuffix(": Unknown")
    for name in _SECRETS:
        if len(secret := os.environ.get(name, "")) >= _SECRET_LENGTH:
            cause = cause.replace(secret, f"${name}")
    code = text.partition("[http_response_code='")[2].partition("'")[0]
    no_object = code == "404" and not _NO_BUCKET.search(cause)
    refused = code and not no_object and code != "416"
    if not (writing or refused or cause.startswith(_NO_ACCESS) or isinstance(error, OSError)):
        return DataError(f"{where}: {cause}; {REMAKE}")
    return StorageError(f"{where}: {cause}; {_way_out(where, cause)}")


def _way_out(where: str, cause: str) -> str:
    if "://" not in where:
        return "free some space or mend the access, then start again"
    if _NO_BUCKET.search(cause):
        return "make the bucket or mend the URL"
    if cause.startswith(("PERMISSION_DENIED", "UNAUTHENTICATED", "INTERNAL")):
        return "give credentials that are allowed this, by the environment or a profile"
    return "start again when it answers"
