"""How TensorStore reaches a folder, `s3://bucket/prefix` or `gs://bucket/prefix`: URLs, credentials, retries.

Credentials come from the environment or a profile, as the tools of each cloud take them, never from a URL.
`AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL` and `AWS_REGION` or `AWS_DEFAULT_REGION` lead to other servers of S3's
protocol; `TENSORSTORE_GCS_HTTP_URL` does for Google's. At most 32 requests are under way at once
(`TENSORSTORE_S3_REQUEST_CONCURRENCY`, `TENSORSTORE_GCS_REQUEST_CONCURRENCY`).
"""

import os
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import tensorstore as ts

from jaxinfra.errors import ConfigError

RETRY_S = 60.0  # how long a failing request is tried again: a minute of waiting between a dozen tries
RETRY_ENV = "JAXINFRA_STORAGE_RETRY_S"  # of the environment: another time in seconds

_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 8.0
_DRIVERS = {"s3": "s3", "gs": "gcs"}
# TensorStore takes these from the environment alone, and without them waits for a silent server for ever.
_PATIENCE = {
    "TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS": "10",
    "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "20",
    "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "1",
}


def normalize_url(url: str) -> str:
    """The URL without what does not belong to it: a slash at its end, `~`, `file://`.

    ConfigError where it is of no kind that is known, or has credentials or a query in it; they are not shown.
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


def tensorstore_context(*, cache_bytes: int = 0) -> ts.Context:
    """Returns the context shared by all that is opened with a cache of this size: the cache, and the retries.

    ConfigError where the environment has a time that is none.
    """
    text = os.environ.get(RETRY_ENV, str(RETRY_S))
    try:
        if not 0 < (retry_s := float(text)) <= 24 * 3600:
            raise ValueError
    except ValueError:
        fix = f"use {RETRY_ENV}={RETRY_S:.0f}"
        raise ConfigError(f"{RETRY_ENV}={text}: expected seconds, above 0 and up to a day; {fix}") from None
    return _cached_context(retry_s, cache_bytes)


@cache
def _cached_context(retry_s: float, cache_bytes: int) -> ts.Context:
    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)
    waits = [min(_FIRST_WAIT_S, retry_s / 32)]
    while sum(waits) < retry_s:
        waits.append(min(2 * waits[-1], _LONGEST_WAIT_S))
    retries = {"max_retries": len(waits), "initial_delay": f"{waits[0]}s", "max_delay": f"{_LONGEST_WAIT_S}s"}
    cache_pool = {"total_bytes_limit": cache_bytes}
    return ts.Context({"cache_pool": cache_pool, "s3_request_retries": retries, "gcs_request_retries": retries})


def kvstore_spec(url: str) -> dict[str, Any]:
    """How TensorStore opens a place; `url` as `check_url` gives it."""
    if "://" not in url:
        return {"driver": "file", "path": f"{url}/"}
    parts = urlsplit(url)
    path = parts.path.strip("/")
    spec = {"driver": _DRIVERS[parts.scheme], "bucket": parts.netloc, "path": f"{path}/" if path else ""}
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
    # Without "environment" profiles are looked for first, and that they are not there is complained of on stderr.
    # Without its name here TensorStore looks for a profile of no name, whatever AWS_PROFILE says (0.1.86).
    profile = {"type": "default", "profile": os.environ.get("AWS_PROFILE") or "default"}
    settings["aws_credentials"] = {"type": "environment"} if "AWS_ACCESS_KEY_ID" in os.environ else profile
    return settings
