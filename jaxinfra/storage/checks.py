"""Is there room, may we write, and what went wrong when we could not: the storage below the checkpoints.

Not for the content of a checkpoint. Invariant: every failure of storage ends as one `StorageError` of one
line, with the path and the cause in the words of the operating system.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from etils import epath

from jaxinfra.errors import StorageError

_OS_ERROR = re.compile(r"os_error_code='(\d+)'")
_STATUS = re.compile(r"^[A-Z]+(_[A-Z]+)*: ")
_LONGEST_CAUSE = 300


def absolute(directory: epath.PathLike) -> epath.Path:
    """The absolute path of a local directory; a path of an object store (`gs://...`) as it is."""
    return epath.Path(directory) if _remote(directory) else epath.Path(os.path.abspath(directory))


def check_space(directory: epath.PathLike, needed_bytes: int) -> None:
    """Checks that the file system of `directory`, which need not exist yet, has `needed_bytes` free.

    Object stores have no such limit and always pass.

    Raises:
        StorageError: there is less room than that.
    """
    if _remote(directory):
        return
    free_bytes = _free_bytes(directory)
    if free_bytes < needed_bytes:
        raise StorageError(
            f"{directory}: {_gigabytes(free_bytes)} free, checkpoints need {_gigabytes(needed_bytes)}; "
            "free some space, choose another directory or use a smaller checkpoint.keep_last"
        )


def make_writable(directory: epath.PathLike) -> None:
    """Makes `directory` if it is missing and checks, by writing a file, that this process may write there.

    Raises:
        StorageError: it cannot be made or written.
    """
    with writing_to(directory):
        epath.Path(directory).mkdir(parents=True, exist_ok=True)
        if not _remote(directory):
            # Permission bits do not tell of a read-only or full file system, so write. The file has no name
            # that could stay behind.
            with tempfile.TemporaryFile(dir=directory) as probe:
                probe.write(b"\0")


@contextmanager
def writing_to(directory: epath.PathLike) -> Iterator[None]:
    """Turns an `OSError` into a `StorageError` that names `directory` and the cause."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{directory}: cannot be written: {cause_of(error)}; mend it or choose another directory"
        ) from error


def is_storage_failure(error: BaseException) -> bool:
    """Whether `error` came from the storage: an `OSError`, or TensorStore's status in a plain exception."""
    text = str(error)
    return isinstance(error, OSError) or bool(_OS_ERROR.search(text) or _STATUS.match(text))


def cause_of(error: BaseException) -> str:
    """The cause in one short line, in the operating system's words where it gave any."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error)
    if code := _OS_ERROR.search(text):
        return os.strerror(int(code.group(1)))
    # TensorStore appends pages of source locations and specs in brackets.
    line = " ".join(text.split(" [", 1)[0].split())
    return line[:_LONGEST_CAUSE] or type(error).__name__


def _remote(directory: epath.PathLike) -> bool:
    return "://" in os.fspath(directory)


def _free_bytes(directory: epath.PathLike) -> int:
    place = Path(os.path.abspath(directory))
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _gigabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.3g} GB"
