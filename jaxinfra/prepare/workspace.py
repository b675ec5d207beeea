"""Where a version is in the making: a folder that one process holds, whose parts outlive a kill."""

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

WORK = ".work"
STREAM = ".stream"


def require_store(store: ObjectStore) -> None:
    """Raises ConfigError for a local folder with something else in it, StorageError for one that cannot be read."""
    folder = store.folder
    if folder is None:
        return
    nearest = next(each for each in (folder, *folder.parents) if each.exists())
    with storage_errors(f"store={folder}", action="read"):
        there = {each.name for each in nearest.iterdir()}
    # A process that is killed before it has listed its version leaves that, and a lock of the list.
    others = {name for name in there - {WORK, STREAM} if not (is_fingerprint(name) or name.startswith(versions.INDEX))}
    if nearest == folder and versions.INDEX not in there and others:
        raise ConfigError(f"store={folder}: holds something that is no store ({min(others)}); choose an empty place")


@contextmanager
def workspace(store: ObjectStore, made_of: str, place: str | None) -> Iterator[Path]:
    """The folder of one version in the making, held by a lock; kept when the work ends early, removed when it is done.

    What is left there of other recipes of the store is removed: one version of it is in the making at a time. It is
    named by what the version is made of, and below `place`; None is in the store, or in the user's cache where the
    store is remote. Raises ConfigError if another process holds it, and StorageError for what cannot be written inside.
    """
    root = _root(store, place)
    work = root / made_of
    with storage_errors(f"store={store.url}"):
        root.mkdir(parents=True, exist_ok=True)
        lock = os.open(root, os.O_RDONLY)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not (root.exists() and os.path.samestat(os.fstat(lock), root.stat())):
                    raise BlockingIOError  # that one has removed it in this moment
            except BlockingIOError:
                raise ConfigError(f"store={store.url}: another process is preparing it; wait for that one") from None
            for left in root.iterdir():
                if left != work:
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
            work.mkdir(exist_ok=True)
            yield work
            shutil.rmtree(root)
        finally:
            os.close(lock)


def kept_folder(store: ObjectStore, name: str, place: str | None) -> Path:
    """Makes a folder beside the one of what is in the making, unless it is there; nothing removes it."""
    root = _root(store, place)
    folder = root.with_name(STREAM if root.name == WORK else root.name + STREAM) / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _root(store: ObjectStore, place: str | None) -> Path:
    if place is None and store.folder is not None:
        return store.folder / WORK
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxinfra" / "prepare"
    return (cache if place is None else Path(place).expanduser().absolute()) / digest_of(store.url)
