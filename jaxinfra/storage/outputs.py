"""Output files of commands, on a disk or in a bucket: checked before the long work, written atomically after it."""

import json
import os
from pathlib import Path

from jaxinfra.errors import ConfigError, StorageError
from jaxinfra.storage.atomic import write_bytes_atomic
from jaxinfra.storage.errors import storage_errors
from jaxinfra.storage.location import is_remote
from jaxinfra.storage.objects import ObjectStore

_FIX = "change its permissions or name another file"


def check_writable(path: str | Path | None) -> None:
    """Raises StorageError if a file cannot be written, or its bucket cannot be read; ConfigError for a wrong URL.

    None is no file, and passes.
    """
    if path is None:
        return
    if is_remote(path):
        store, name = _object_at(str(path))
        store.exists(name)
        return
    path = Path(path)
    folder = path.absolute().parent
    if path.is_dir():
        raise StorageError(f"{path}: is a folder; name a file")
    if not folder.is_dir():
        raise StorageError(f"{path}: its folder does not exist; create it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StorageError(f"{path}: its folder is not writable; {_FIX}")


def write_text(path: str | Path, text: str) -> None:
    """Writes a file atomically; raises StorageError if that fails. Pipes and devices are written to directly."""
    if is_remote(path):
        store, name = _object_at(str(path))
        store.write(name, text.encode())
        return
    path = Path(path)
    with storage_errors(path, fix=_FIX):
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
        else:
            write_bytes_atomic(path.resolve(), text.encode())


def write_json(path: str | Path | None, value: object) -> None:
    """Writes a value as JSON, as `write_text`; None is no file, and nothing is written."""
    if path is not None:
        write_text(path, json.dumps(value, indent=2) + "\n")


def read_text(path: Path) -> str:
    """Reads a file; raises StorageError if that fails."""
    with storage_errors(path, action="read", fix=_FIX):
        return path.read_text(encoding="utf-8")


def read_written(path: str) -> str:
    """Reads a file that `write_text` has written, from a folder or a bucket; raises JaxinfraError if that fails."""
    if not is_remote(path):
        return read_text(Path(path))
    store, name = _object_at(path)
    return store.read(name).decode()


def _object_at(url: str) -> tuple[ObjectStore, str]:
    parent, _, name = url.rpartition("/")
    if not name or parent.endswith("/"):
        raise ConfigError(f"{url}: names no file in a bucket; use a URL such as s3://BUCKET/FILE")
    return ObjectStore(parent), name
