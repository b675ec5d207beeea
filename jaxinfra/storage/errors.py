"""Turns the exceptions of file systems, TensorStore and fsspec's clients into one-line errors.

A message names the path or URL, the cause in the words of the system that reported it, and a fix. It contains no
credentials. `storage_errors` is for files and fsspec. `call_storage` is for TensorStore, and tells damaged data from
storage that fails.
"""

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jaxinfra.errors import ConfigError, DataError, JaxinfraError, StorageError, quoted
from jaxinfra.storage.credentials import mask_credentials

DAMAGED_VERSION_FIX = "move this version away, then prepare or copy it again"
"""The fix for a damaged version of a store: an existing version is never overwritten."""

_MAX_CAUSE_CHARS = 300
# TensorStore raises ValueError with a text such as
#     NOT_FOUND: Error reading "s3://bucket/x" [http_response_code='404'] [source locations='s3.cc:1']
_STATUS = re.compile(
    "(ABORTED|ALREADY_EXISTS|CANCELLED|DATA_LOSS|DEADLINE_EXCEEDED|FAILED_PRECONDITION|INTERNAL|INVALID_ARGUMENT|NOT_FOUND"
    "|OUT_OF_RANGE|PERMISSION_DENIED|RESOURCE_EXHAUSTED|UNAUTHENTICATED|UNAVAILABLE|UNIMPLEMENTED|UNKNOWN): "
)
_OS_ERROR = re.compile(r"os_error_code='(\d+)'")
_HTTP_CODE = re.compile(r"\[http_response_code='(\d+)'")
_NO_BUCKET = re.compile("NoSuchBucket|bucket does not exist")
# Statuses of a storage that refuses or fails; others may be about one object.
_STORAGE_STATUS = re.compile(
    "ABORTED|DEADLINE_EXCEEDED|INTERNAL|PERMISSION_DENIED|RESOURCE_EXHAUSTED|UNAUTHENTICATED|UNAVAILABLE"
)
# What JAX reports with such a status, if another process is lost while they work together.
_OF_PROCESSES = re.compile("Gloo|NCCL|CoordinationService|coordination service|[Bb]arrier")
# fsspec's clients raise errors of their own, known by the top-level package, which need not be installed.
_CLIENTS = frozenset({
    *("aiobotocore", "aiohttp", "botocore", "gcsfs", "google", "huggingface_hub", "s3fs"),
    *("httpcore", "httpcore2", "httpx", "httpx2"),
})  # fmt: skip
_MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_DISK_FULL = {os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)}


@contextmanager
def storage_errors(
    where: object, *, action: str = "written", fix: str | None = None, missing: str | None = None
) -> Iterator[None]:
    """Raises StorageError if storage fails inside the block; other exceptions pass through.

    Args:
        where: the path or URL, for the message.
        action: the verb of the message, as in "cannot be written".
        fix: the advice of the message; None derives it from the cause.
        missing: the whole message of the ConfigError that is raised instead if the file does not exist.
    """
    try:
        yield
    except JaxinfraError:
        raise
    except Exception as error:
        if missing and isinstance(error, _MISSING):
            raise ConfigError(mask_credentials(missing)) from error
        if not is_storage_error(error):
            raise
        # A listing reads subfolders, too: the message names the one that this process may not read.
        unreadable = error.filename if action == "read" and isinstance(error, PermissionError) else None
        raise _storage_error(str(unreadable or where), cause_of(error), action, fix) from error


def call_storage[T](where: str, call: Callable[[], T], *, writing: bool = False, fix: str = DAMAGED_VERSION_FIX) -> T:
    """Calls TensorStore or the file system; raises the DataError or StorageError that `classify_error` returns."""
    try:
        return call()
    except (ValueError, IndexError, OSError) as error:  # IndexError: outside an array
        raise classify_error(where, error, writing=writing, fix=fix) from None


def classify_error(
    where: str, error: Exception, *, writing: bool = False, fix: str = DAMAGED_VERSION_FIX
) -> DataError | StorageError:
    """Returns DataError, with a fix, if an object is missing or damaged, StorageError if storage cannot be accessed."""
    cause = cause_of(error)
    status = " ".join(str(error).split())
    http_code = match[1] if (match := _HTTP_CODE.search(status)) else ""
    # 404: the object is missing, or its bucket is. 416: the object is shorter than the range that was read.
    # No code: a local file, or an error of TensorStore's own, such as an array that it cannot decode.
    object_damaged = http_code in ("", "416") or (http_code == "404" and not _NO_BUCKET.search(cause))
    if writing or not object_damaged or _STORAGE_STATUS.match(status) or isinstance(error, OSError):
        return _storage_error(where, cause, "written" if writing else "read", None)
    return DataError(f"{where}: {cause}; {fix}")


def is_storage_error(error: BaseException) -> bool:
    """Returns whether an exception is a StorageError, or from the system, TensorStore or a client of fsspec."""
    if isinstance(error, OSError | StorageError) or type(error).__module__.split(".")[0] in _CLIENTS:
        return True
    if type(error).__name__ == "JaxRuntimeError" and _OF_PROCESSES.search(str(error)):
        return False
    return bool(_OS_ERROR.search(str(error)) or _STATUS.match(str(error)))


def cause_of(error: BaseException) -> str:
    """Returns the cause in one short line, in the words of the operating system if it reported the error."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror
    elif code := _OS_ERROR.search(text):
        text = os.strerror(int(code[1]))
    elif isinstance(error, FileNotFoundError | PermissionError):  # fsspec gives only the path, or the server's page
        text = os.strerror(errno.ENOENT if isinstance(error, FileNotFoundError) else errno.EACCES)
    elif _STATUS.match(text):  # TensorStore appends source locations and responses in brackets
        text = text.split(" [", 1)[0].removesuffix(": Unknown")
    return quoted(mask_credentials(text)[:_MAX_CAUSE_CHARS], _MAX_CAUSE_CHARS) or type(error).__name__


def _storage_error(where: str, cause: str, action: str, fix: str | None) -> StorageError:
    return StorageError(f"{mask_credentials(where)}: cannot be {action}: {cause}; {fix or _fix(where, cause)}")


def _fix(where: str, cause: str) -> str:
    if cause in _DISK_FULL:
        return "free some space or choose another place"
    if cause == os.strerror(errno.ENOENT):
        return "check the path; if it existed a moment ago, start again"
    if "://" not in where:
        return "correct the path or its permissions, or choose another place"
    if "RequestTimeTooSkewed" in cause:
        return "set the clock of this host"
    if _NO_BUCKET.search(cause):
        return "create the bucket or correct the URL"
    denied = ("PERMISSION_DENIED", "UNAUTHENTICATED", "INTERNAL", os.strerror(errno.EACCES))
    if cause.startswith((*denied, "Unable to locate credentials")):  # the last one is of s3fs
        return "set credentials that are allowed to do this, in the environment or a profile"
    return "start again when the server responds"
