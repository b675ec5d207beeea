"""JAX's compile cache with a hash in each entry, which is compared before its program is loaded.

JAX has none: one flipped bit gives other losses, a crash at each start, or NaN. An entry here is the SHA-256 of its key
and its program, and the program, so that an entry under another's name is found, too. Its name is not that of JAX's own
entries: neither is ever read as the other.
"""

import hashlib
import logging
import os
import secrets
from contextlib import nullcontext
from pathlib import Path
from typing import override

import jax
from jax._src import compilation_cache  # no public function opens the cache
from jax._src.lru_cache import LRUCache

from jaxinfra.machine import COMPILE_ANEW
from jaxinfra.storage.objects import ObjectStore

_log = logging.getLogger(__name__)
_HASH_BYTES = hashlib.sha256().digest_size
SUFFIX = "-sha256-cache"
"""Ends the name of each entry, after its key."""


class CheckedCache(LRUCache):
    """The cache in a folder, or in a bucket, which is read and written as all others are."""

    def __init__(self, path: str, *, max_size: int) -> None:
        """Opens the cache; `max_size` in bytes is for folders, -1 is no limit."""
        self._store = ObjectStore(path)
        self._path = Path(path)  # JAX logs it
        if self._store.folder is not None:
            super().__init__(str(self._store.folder), max_size=max_size)

    @override
    def get(self, key: str) -> bytes | None:
        """Returns a program, or None if there is none; deletes and names one that is damaged."""
        in_folder, name = self._store.folder is not None, f"{key}{SUFFIX}"
        entry = super().get(name.removesuffix("-cache")) if in_folder else self._store.read_or_none(name)
        if entry is None:
            return None
        program = unseal(key, entry)
        if program is not None and COMPILE_ANEW not in os.environ:
            return program
        if program is None or jax.process_index() == 0:  # which writes: another may come when it has
            self._store.delete(name)
        if program is None:
            url = self._store.url_of(name)
            _log.warning("%s: damaged, its hash differs; deleted, and its program is compiled anew", url)
        return None

    @override
    def put(self, key: str, value: bytes) -> None:
        """Adds a program; no reader sees a part of it. A kill may leave one, under a name that is never read."""
        name, entry = f"{key}{SUFFIX}", seal(key, value)
        if (folder := self._store.folder) is None:
            self._store.write(name, entry)
            return
        name, part = name.removesuffix("-cache"), secrets.token_hex(8)
        # JAX's lock, which `put` takes, too: an eviction by another process must not look for the part that has gone.
        with self.lock.acquire(timeout=self.lock_timeout_secs) if self.eviction_enabled else nullcontext():
            super().put(part, entry)
            for suffix in ("-atime", "-cache"):  # there is none without a limit, and none that is beyond it
                if (folder / f"{part}{suffix}").exists():
                    os.replace(folder / f"{part}{suffix}", folder / f"{name}{suffix}")


def seal(key: str, program: bytes) -> bytes:
    """Returns the entry of a program."""
    sha = hashlib.sha256(f"{key}\n".encode())
    sha.update(program)
    return sha.digest() + program


def unseal(key: str, entry: bytes) -> bytes | None:
    """Returns the program of an entry; None if it is damaged, or that of another key."""
    program = entry[_HASH_BYTES:]
    return program if seal(key, program) == entry else None


def use_cache(cache: type[LRUCache] = CheckedCache) -> type[LRUCache]:
    """Lets JAX open caches of this class from now on; returns the class that it has used."""
    names = compilation_cache.__dict__
    before, names["LRUCache"] = names["LRUCache"], cache
    compilation_cache.reset_cache()  # else JAX keeps the one that it has opened
    return before
