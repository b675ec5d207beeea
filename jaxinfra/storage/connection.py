"""Connects TensorStore to a folder, `s3://bucket/prefix` or `gs://bucket/prefix`: URLs, credentials, retries.

Credentials come from the environment or a profile, as for the command-line tools of each cloud, never from a URL.
`AWS_ENDPOINT_URL_S3` (or `AWS_ENDPOINT_URL`) and `AWS_REGION` (or `AWS_DEFAULT_REGION`) select another server that
speaks S3's protocol; `TENSORSTORE_GCS_HTTP_URL` selects one that speaks Google's. At most 32 requests run at once,
unless `TENSORSTORE_S3_REQUEST_CONCURRENCY` or `TENSORSTORE_GCS_REQUEST_CONCURRENCY` says otherwise.
"""

import os
import socket
import time
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import tensorstore as ts

from jaxinfra.errors import ConfigError, StorageError
from jaxinfra.storage.background import ask_in_thread

RETRY_S = 60.0  # back-off of a failing request in total, over about a dozen attempts
RETRY_ENV = "JAXINFRA_STORAGE_RETRY_S"  # the environment variable that overrides it

_FIRST_WAIT_S = 0.5
_MAX_WAIT_S = 8.0
_CONNECT_S, _PAUSE_S = 10.0, 4.0  # in which a server is looked for, twice, and the pause in between
_DRIVERS = {"s3": "s3", "gs": "gcs"}
# TensorStore reads these only from the environment, and without them waits forever for a silent server.
_TIMEOUTS = {
    "TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS": "10",
    "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "20",
    "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "1",
}


def normalize_url(url: str) -> str:
    """Returns the URL without a trailing slash, or the absolute path if it is a local folder or `file://`.

    Raises ConfigError for an unknown scheme, a `file://` URL with a host, and a URL with credentials or a query, which
    the message hides.
    """
    if "://" not in url:
        path = Path(url).expanduser().absolute()
        return str(path.resolve() if ".." in path.parts else path)  # TensorStore takes no ".."
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]  # without the user and password
    safe_url = f"{parts.scheme}://{host}{parts.path}".rstrip("/")
    if parts.scheme == "file" and host not in ("", "localhost"):
        raise ConfigError(f"{safe_url}: a file:// URL cannot name a host; use file:///{host}{parts.path}")
    # "@" ends a user name; ":" starts a password or a port.
    if "@" in parts.netloc or ":" in host or parts.query or parts.fragment:
        raise ConfigError(
            f"{safe_url}: the URL of a store must not contain credentials, a query or a fragment; "
            "set credentials in the environment or a profile"
        )
    if parts.scheme == "file":
        return str(Path(parts.path).absolute())
    if parts.scheme not in _DRIVERS or not parts.netloc:
        raise ConfigError(f"{safe_url}: not a URL of a store; use a folder, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX")
    return safe_url


def tensorstore_context(*, cache_bytes: int = 0) -> ts.Context:
    """Returns the context (cache and retries); calls with the same arguments return the same one.

    Raises ConfigError if `RETRY_ENV` is not a valid time.
    """
    return _cached_context(tuple(retry_waits_s()), cache_bytes)


def retry_waits_s() -> list[float]:
    """Returns the pauses after which a failing request is tried again; ConfigError if `RETRY_ENV` is no valid time."""
    text = os.environ.get(RETRY_ENV, str(RETRY_S))
    try:
        retry_s = float(text)
    except ValueError:
        retry_s = 0.0
    if not 0 < retry_s <= 24 * 3600:
        fix = f"use {RETRY_ENV}={RETRY_S:.0f}"
        raise ConfigError(f"{RETRY_ENV}={text}: expected seconds, more than 0 and at most a day; {fix}")
    waits_s = [min(_FIRST_WAIT_S, retry_s / 32)]
    while sum(waits_s) < retry_s:
        waits_s.append(min(2 * waits_s[-1], _MAX_WAIT_S))
    return waits_s


@cache
def _cached_context(waits_s: tuple[float, ...], cache_bytes: int) -> ts.Context:
    for name, value in _TIMEOUTS.items():
        os.environ.setdefault(name, value)
    # TensorStore takes a number of retries, not a time.
    retries = {"max_retries": len(waits_s), "initial_delay": f"{waits_s[0]}s", "max_delay": f"{_MAX_WAIT_S}s"}
    cache_pool = {"total_bytes_limit": cache_bytes}
    return ts.Context({"cache_pool": cache_pool, "s3_request_retries": retries, "gcs_request_retries": retries})


def kvstore_spec(url: str) -> dict[str, object]:
    """Returns the TensorStore spec of a folder or bucket; `url` is the result of `normalize_url`."""
    if "://" not in url:
        return {"driver": "file", "path": f"{url}/"}
    parts = urlsplit(url)
    path = parts.path.strip("/")
    spec: dict[str, object] = {"bucket": parts.netloc, "path": f"{path}/" if path else ""}
    return spec | {"driver": _DRIVERS[parts.scheme]} | (_s3_settings() if parts.scheme == "s3" else {})


def require_server(url: str) -> None:
    """Raises StorageError if the server of a bucket is not there, which TensorStore would try for a minute.

    That is so if its name has no address, or if it refuses to connect, twice. A slow server is left to TensorStore.
    """
    parts = urlsplit(url)
    # A URL with credentials is refused where it is read; a proxy finds the server by itself.
    if parts.scheme not in _DRIVERS or "@" in parts.netloc or getproxies():
        return
    server = os.environ.get("TENSORSTORE_GCS_HTTP_URL", "https://storage.googleapis.com")
    if parts.scheme == "s3":
        server = str(_s3_settings().get("endpoint", f"https://{parts.netloc}.s3.amazonaws.com"))
    try:
        place = urlsplit(server)
        if place.hostname is not None:
            _connect_twice(place.hostname, place.port or (80 if place.scheme == "http" else 443))
    except OSError as error:
        raise StorageError(f"{url}: no server at {server}: {error.strerror or error}; check the network") from None
    except ValueError:  # TensorStore says what is wrong with the server's URL
        return


@cache
def _connect_twice(host: str, port: int) -> None:
    """Raises the second error if a host, within some seconds, has twice no address or refuses to connect."""

    def connect() -> OSError | None:
        if _refusal(host, port) is None:
            return None
        time.sleep(_PAUSE_S)
        return _refusal(host, port)

    answer = ask_in_thread(connect, _CONNECT_S)  # a name may be looked up for long
    if answer.done() and (error := answer.result()) is not None:
        raise error


def _refusal(host: str, port: int) -> OSError | None:
    """Returns the error if a host has no address, or refuses to connect; None for all other errors."""
    try:
        socket.create_connection((host, port), timeout=_CONNECT_S).close()
    except (socket.gaierror, ConnectionRefusedError) as error:
        return error
    except (OSError, UnicodeError):  # it is slow, or this is no name of a host: TensorStore finds out
        return None
    return None


def _s3_settings() -> dict[str, object]:
    """Reads what AWS tools take from the environment and TensorStore does not, or only with warnings."""
    settings: dict[str, object] = {}
    name = "AWS_ENDPOINT_URL_S3" if os.environ.get("AWS_ENDPOINT_URL_S3") else "AWS_ENDPOINT_URL"
    if endpoint := os.environ.get(name):
        if "@" in endpoint:
            raise ConfigError(f"{name}: contains credentials; set AWS_ACCESS_KEY_ID or a profile instead")
        settings["endpoint"] = endpoint
        if region := os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
            settings["aws_region"] = region
    # Without "environment", TensorStore looks for profiles first and prints a warning if there are none.
    # Without an explicit profile it looks for one with an empty name, whatever AWS_PROFILE says (0.1.86).
    profile = {"type": "default", "profile": os.environ.get("AWS_PROFILE") or "default"}
    settings["aws_credentials"] = {"type": "environment"} if "AWS_ACCESS_KEY_ID" in os.environ else profile
    return settings
