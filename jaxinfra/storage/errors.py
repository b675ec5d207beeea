"""Turns what file systems and their clients raise into the one-line errors of this project.

These are `OSError`, statuses of TensorStore, and errors of the clients that fsspec uses. Invariant: a message names the
place, the cause in the words of whoever found it, and a fix; it has no credentials in it.
"""

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jaxinfra.errors import ConfigError, DataError, JaxinfraError, StorageError
from jaxinfra.storage.credentials import mask_credentials

DAMAGED_VERSION_FIX = "move this version away, then prepare it again or copy it anew"
"""The fix for a damaged version: nothing is written over one that is there."""

_CAUSE_CHARACTERS = 300
_STATUS = re.compile(
    "(ABORTED|ALREADY_EXISTS|CANCELLED|DATA_LOSS|DEADLINE_EXCEEDED|FAILED_PRECONDITION|INTERNAL|INVALID_ARGUMENT|NOT_FOUND"
    "|OUT_OF_RANGE|PERMISSION_DENIED|RESOURCE_EXHAUSTED|UNAUTHENTICATED|UNAVAILABLE|UNIMPLEMENTED|UNKNOWN): "
)
_OS_ERROR = re.compile(r"os_error_code='(\d+)'")
_HTTP_CODE = re.compile(r"\[http_response_code='(\d+)'")
_NO_BUCKET = re.compile("NoSuchBucket|bucket does not exist")
_NO_ACCESS = re.compile(
    "ABORTED|DEADLINE_EXCEEDED|INTERNAL|PERMISSION_DENIED|RESOURCE_EXHAUSTED|UNAUTHENTICATED|UNAVAILABLE"
)
_CLIENTS = frozenset({"aiobotocore", "aiohttp", "botocore", "gcsfs", "google", "httpx", "huggingface_hub", "s3fs"})
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_FULL = {os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)}


@contextmanager
def storage_errors(
    where: object, *, action: str = "written", fix: str | None = None, missing: str | None = None
) -> Iterator[None]:
    """Raises StorageError for a failure of storage inside; every other exception passes.

    Args:
        where: the path or URL, for the message.
        action: what cannot be done, as in "cannot be written".
        fix: what to do about it; None chooses by the cause.
        missing: the whole message if there is no such file, which is then a ConfigError.
    """
    try:
        yield
    except JaxinfraError:
        raise
    except Exception as error:
        if missing and isinstance(error, _ABSENT):
            raise ConfigError(mask_credentials(missing)) from error
        if not is_storage_error(error):
            raise
        # A folder is listed with all below it: the message names the one that is closed.
        closed = error.filename if action == "read" and isinstance(error, PermissionError) else None
        raise _storage_error(str(closed or where), cause_of(error), action, fix) from error


def call_storage[T](where: str, call: Callable[[], T], *, writing: bool = False) -> T:
    """Runs a call of TensorStore, or of the file system, on a part of a store.

    DataError where what is read is missing or damaged, StorageError where the place may not or cannot be read or
    written.
    """
    try:
        return call()
    except (ValueError, OSError) as error:
        raise classify_error(where, error, writing=writing) from None


def classify_error(where: str, error: Exception, *, writing: bool = False) -> DataError | StorageError:
    """Tells damaged data from storage that refuses, by TensorStore's status and the server's answer."""
    cause = cause_of(error)
    status = " ".join(str(error).split())
    code = found[1] if (found := _HTTP_CODE.search(status)) else ""
    no_object = code == "404" and not _NO_BUCKET.search(cause)
    refused = code and not no_object and code != "416"
    if writing or refused or _NO_ACCESS.match(status) or isinstance(error, OSError):
        return _storage_error(where, cause, "written" if writing else "read", None)
    return DataError(f"{where}: {cause}; {DAMAGED_VERSION_FIX}")


def is_storage_error(error: BaseException) -> bool:
    """Tells whether an exception comes from storage: from the operating system, TensorStore or a client of fsspec."""
    if isinstance(error, OSError) or type(error).__module__.split(".")[0] in _CLIENTS:
        return True
    return bool(_OS_ERROR.search(str(error)) or _STATUS.match(str(error)))


def cause_of(error: BaseException) -> str:
    """Returns the cause in one short line, in the words of the operating system where it gave any."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror
    elif code := _OS_ERROR.search(text):
        text = os.strerror(int(code[1]))
    elif isinstance(error, FileNotFoundError | PermissionError):  # fsspec gives the path alone, or the server's page
        text = os.strerror(errno.ENOENT if isinstance(error, FileNotFoundError) else errno.EACCES)
    elif _STATUS.match(text):  # TensorStore appends pages of source locations and answers in brackets
        text = text.split(" [", 1)[0].removesuffix(": Unknown")
    return mask_credentials(text)[:_CAUSE_CHARACTERS] or type(error).__name__


def _storage_error(where: str, cause: str, action: str, fix: str | None) -> StorageError:
    return StorageError(f"{mask_credentials(where)}: cannot be {action}: {cause}; {fix or _fix(where, cause)}")


def _fix(where: str, cause: str) -> str:
    if cause in _FULL:
        return "free some space there or choose another place"
    if cause == os.strerror(errno.ENOENT):
        return "check the path; if it was there a moment ago, start again"
    if "://" not in where:
        return "mend it or choose another place"
    if _NO_BUCKET.search(cause):
        return "make the bucket or mend the URL"
    if cause.startswith(("PERMISSION_DENIED", "UNAUTHENTICATED", "INTERNAL", os.strerror(errno.EACCES))):
        return "give credentials that are allowed this, by the environment or a profile"
    return "start again when it answers"
