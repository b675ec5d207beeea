"""Lists, finds and publishes the versions of a store.

`versions.json` lists the versions, the newest (prepared last) at the end. The list is replaced atomically after the
version is written. A version that is not listed can still be opened by its path. Published versions never change.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from jaxinfra.data.store import manifest as manifests
from jaxinfra.data.store.manifest import Manifest
from jaxinfra.errors import ConfigError, DataError
from jaxinfra.storage.atomic import move_folder
from jaxinfra.storage.objects import ObjectStore

INDEX = "versions.json"


@dataclass(frozen=True, kw_only=True)
class Version:
    """An entry of `versions.json`."""

    fingerprint: str  # hash of the contents, and name of the folder
    made_of: str  # digest of the recipe and its source files; equal inputs are not prepared twice
    created: str  # time in UTC


def list_versions(store: ObjectStore) -> list[Version]:
    """Returns the versions of a store, the newest last; [] if there is no store, DataError if the list is damaged."""
    return _parse_index(store.read(INDEX), store.url_of(INDEX)) if store.exists(INDEX) else []


def _parse_index(content: bytes, url: str) -> list[Version]:
    try:
        return [Version(**entry) for entry in json.loads(content)["versions"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{url}: damaged list of versions ({error}); open a version by its path") from None


def find_version(store: ObjectStore, version: str | None, *, section: str, hint: str) -> ObjectStore:
    """Returns the folder of a version; `store` may be a version itself, other arguments are as in `Store.open`.

    ConfigError if no version starts with `version`, or several do; DataError if the list is damaged.
    """
    known = list_versions(store)
    if not known:
        if store.exists(manifests.FILE_NAME):
            return store
        raise ConfigError(f"{section}.store={store.url}: no store there; make it with: {hint}")
    matching = [entry for entry in known if version is None or entry.fingerprint.startswith(version)]
    if version is not None and len({entry.fingerprint for entry in matching}) != 1:
        cause = "matches several of" if matching else "is not among"
        choices = ", ".join(entry.fingerprint for entry in (matching or known)[-3:])  # the newest three
        raise ConfigError(
            f"{section}.version={version}: {cause} the {len(known)} versions of {store.url}; "
            f"use {section}.version=none or one of {choices}, and another name=... if a run has started on it"
        )
    return store.child(matching[-1].fingerprint)


def publish_version(build: Path, store: ObjectStore, manifest: Manifest, made_of: str) -> None:
    """Adds a finished version to the store, completely or not at all; StorageError if it cannot be written.

    `build` is a local folder with all files of the version but the manifest. It is renamed if possible, else copied.
    """
    fingerprint = manifest.fingerprint
    version = store.child(fingerprint)
    if not version.exists(manifests.FILE_NAME):
        (build / manifests.FILE_NAME).write_bytes(manifest.to_bytes())
        if version.folder is None or not move_folder(build, version.folder):
            # Files that a bucket already has at this URL are the same ones; a local folder could hold anything.
            version.upload(build, last=[manifests.FILE_NAME], resume=version.folder is None)
    _append_to_index(store, Version(fingerprint=fingerprint, made_of=made_of, created=manifest.created))


def make_newest(store: ObjectStore, version: Version) -> bool:
    """Makes a version the newest one, which runs read by default; returns whether another one was."""
    if list_versions(store)[-1].fingerprint == version.fingerprint:
        return False
    _append_to_index(store, version)
    return True


def _append_to_index(store: ObjectStore, version: Version) -> None:
    """Lists a version as the newest, in place of one that was made of the same recipe and files."""

    def change(content: bytes | None) -> bytes:
        known = [] if content is None else _parse_index(content, store.url_of(INDEX))
        kept = [asdict(entry) for entry in known if entry.made_of != version.made_of]
        return (json.dumps({"versions": [*kept, asdict(version)]}, indent=2) + "\n").encode()

    store.atomic_update(INDEX, change)
