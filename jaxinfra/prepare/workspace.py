"""The folder in which one process builds a version; its parts survive a kill."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxinfra.data.store import versions
from jaxinfra.data.store.manifest import digest_of, is_fingerprint
from jaxinfra.errors import ConfigError
from jaxinfra.storage.errors import storage_errors
from jaxinfra.storage.objects import ObjectStore

WORK_DIR = ".work"
STREAM_DIR = ".stream"


def require_store(store: ObjectStore) -> None:
    """Raises ConfigError for a local folder with other files than a store's, StorageError if it cannot be read."""
    folder = store.folder
    if folder is None:
        return
    nearest = next(path for path in (folder, *folder.parents) if path.exists())  # the store may not exist yet
    with storage_errors(f"store={folder}", action="read"):
        names = {each.name for each in nearest.iterdir()}
    # A process that is killed before it lists its version leaves the folder of a fingerprint, and a lock of the index.
    names -= {WORK_DIR, STREAM_DIR}
    others = {name for name in names if not (is_fingerprint(name) or name.startswith(versions.INDEX))}
    if nearest == folder and versions.INDEX not in names and others:
        raise ConfigError(f"store={folder}: is not a store, it holds {min(others)}; use a new or empty folder")


@contextmanager
def open_workspace(store: ObjectStore, name: str, work_dir: str | None) -> Iterator[Path]:
    """Locks and yields the work folder of a version; removes it at the end, but keeps it after an error.

    Only one version of a store is built at a time, so work folders with another name are removed. `name` is a digest of
    all inputs of the version. With `work_dir` None, the folder is in the store, or in the user's cache if it is remote.
    ConfigError if another process is preparing the store, StorageError if the folder cannot be written.
    """
    root = _root(store, work_dir)
    work = root / name
    with storage_errors(f"store={store.url}"):
        root.mkdir(parents=True, exist_ok=True)
        lock = os.open(root, os.O_RDONLY)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not (root.exists() and os.path.samestat(os.fstat(lock), root.stat())):
                    raise BlockingIOError  # another process removed the folder between `mkdir` and the lock
            except BlockingIOError:
                raise ConfigError(f"store={store.url}: another process is preparing it; wait until it ends") from None
            for other in root.iterdir():
                if other != work:
                    shutil.rmtree(other) if other.is_dir() else other.unlink()
            work.mkdir(exist_ok=True)
            yield work
            shutil.rmtree(root)
        finally:
            os.close(lock)


def stream_folder(store: ObjectStore, name: str, work_dir: str | None) -> Path:
    """Makes the folder that keeps the parts of a stream, beside the work folder; nothing removes it."""
    root = _root(store, work_dir)
    folder = root.with_name(STREAM_DIR if root.name == WORK_DIR else root.name + STREAM_DIR) / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def make_empty_folder(path: Path) -> Path:
    """Makes a folder, without the files that a killed process may have left in it."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    return path


def _root(store: ObjectStore, work_dir: str | None) -> Path:
    if work_dir is not None:
        return Path(work_dir).expanduser().absolute() / digest_of(store.url)
    if store.folder is not None:
        return store.folder / WORK_DIR
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "jaxinfra" / "prepare" / digest_of(store.url)
