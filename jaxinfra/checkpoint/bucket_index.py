"""The index of the checkpoints in a bucket, which names the folder of each complete step. Imports no JAX.

`index.json` has the token of the owner of the run, the steps, and the folders of steps that were set aside as damaged.
It has a hash of itself, and is replaced by conditional writes only (`update_index`).
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any

import xxhash

from jaxinfra.checkpoint.manifest import MANIFEST_FILE, DamageError, Manifest, hash_json
from jaxinfra.errors import CheckpointError, RunInUseError
from jaxinfra.storage.objects import ObjectStore

INDEX_FILE = "index.json"
FOLDER = re.compile(r"(?P<step>\d+)\.(?P<token>\d+)\.\d+")
"""The folder of an attempt to save: `STEP.TOKEN.N`."""

type Steps = dict[str, dict[str, Any]]
"""The "folder", the hash of its "manifest" and the "metrics" of each step."""


def read_index(store: ObjectStore) -> dict[str, Any] | None:
    """Returns the index, None if it is missing; raises CheckpointError if it is damaged."""
    content = store.read_or_none(INDEX_FILE)
    return None if content is None else _parse(store, content)


def require_index(store: ObjectStore) -> dict[str, Any]:
    """Returns the index, an empty one before the first owner; CheckpointError if there are checkpoints without it."""
    if (index := read_index(store)) is not None:
        return index
    paths = map(PurePosixPath, store.list_names())
    folders = [path.parts[0] for path in paths if path.name == MANIFEST_FILE and FOLDER.fullmatch(path.parts[0])]
    index = read_index(store)  # the first owner may have written both in the meantime
    if folders and index is None:
        raise CheckpointError(
            f"{store.url_of(INDEX_FILE)}: missing, but there are checkpoints, such as {folders[0]}; restore it, or "
            "move them away to start at step 0"
        )
    return index or _empty()


def owner_token(url: str) -> int:
    """Returns the token of the last owner of the checkpoints below a URL; 0 without one."""
    return (read_index(ObjectStore(url)) or _empty())["token"]


def update_index(store: ObjectStore, token: int | None, change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Changes the index for the owner with this token, and returns it.

    Without a token, which is that of a lease, the owner has the next one. Raises RunInUseError if a newer owner has
    claimed the index.
    """
    result: list[dict[str, Any]] = []

    def update(old: bytes | None) -> bytes:
        index = _empty() if old is None else _parse(store, old)
        own = index["token"] + 1 if token is None else token
        if index["token"] > own:
            raise RunInUseError(f"{store.url}: another process has taken over this run; leave the run to it")
        index["token"] = own
        change(index)
        result[:] = [index]
        return json.dumps({**index, "hash": hash_json(index)}).encode()

    store.atomic_update(INDEX_FILE, update)
    return result[0]


def folders(steps: Steps) -> list[str]:
    """Returns the folders of steps."""
    return [each["folder"] for each in steps.values()]


def leftover_folders(store: ObjectStore, index: Mapping[str, Any]) -> dict[str, int]:
    """Returns the folders that the index does not name, of attempts to save, with the token of each."""
    named = {*folders(index["steps"]), *index["damaged"]}
    found = {name.partition("/")[0] for name in store.list_names()} - named
    return {folder: int(match["token"]) for folder in sorted(found) if (match := FOLDER.fullmatch(folder))}


def read_manifest(store: ObjectStore, step: int, entry: Mapping[str, Any]) -> Manifest:
    """Reads the manifest of a step with this entry in the index; raises DamageError."""
    name = f"{entry['folder']}/{MANIFEST_FILE}"
    content = store.read_or_none(name)
    if content is None:
        raise DamageError(f"{name} is missing")
    manifest = Manifest.decode(content, step)
    if xxhash.xxh3_128_hexdigest(content) != entry["manifest"]:
        raise DamageError(f"{name} is another one than {INDEX_FILE} names")
    return manifest


def _empty() -> dict[str, Any]:
    return {"token": 0, "steps": {}, "damaged": []}


def _parse(store: ObjectStore, content: bytes) -> dict[str, Any]:
    try:
        index = json.loads(content)
        if index.pop("hash") == hash_json(index):
            return index
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise CheckpointError(f"{store.url_of(INDEX_FILE)}: damaged; restore it from a copy")
