"""The versions of a store: which there are, which is meant, and how one is published.

`versions.json` lists them, the one that was prepared last at its end: that is the newest. It is written after the
version that it names, at once; a version that it does not name can still be opened by its own path. Published versions
are never changed or removed here.
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
    """An entry of the list."""

    fingerprint: str  # of its contents, and its folder
    made_of: str  # digest of the recipe and of what it read: the same work is not done twice
    created: str  # when it was made, in UTC


def list_versions(store: ObjectStore) -> list[Version]:
    """The versions of a store, the newest last; none where there is no store. DataError where the list is damaged."""
    return _parsed(store.read(INDEX), store.url_of(INDEX)) if store.exists(INDEX) else []


def _parsed(content: bytes, where: str) -> list[Version]:
    try:
        return [Version(**each) for each in json.loads(content)["versions"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{where}: damaged list of versions ({error}); name a version by its path") from None


def find_version(store: ObjectStore, version: str | None, *, at: str, hint: str) -> ObjectStore:
    """The folder of a version, of arguments as in `Store.open`; `store` may be a version itself.

    Raises ConfigError where there is none or more than one begins so, DataError where the list is damaged.
    """
    known = list_versions(store)
    if not known:
        if store.exists(manifests.FILE_NAME):
            return store
        raise ConfigError(f"{at}.store={store.url}: no store there; make it with: {hint}")
    fitting = [each for each in known if version is None or each.fingerprint.startswith(version)]
    if version is not None and len({each.fingerprint for each in fitting}) != 1:
        there = ", ".join(each.fingerprint for each in (fitting or known)[-3:])
        raise ConfigError(
            f"{at}.version={version}: {'fits several of' if fitting else 'is not among'} the {len(known)} versions of "
            f"{store.url}; use {at}.version=none or one of {there}, and name=ANOTHER where a run was begun on it"
        )
    return store.child(fitting[-1].fingerprint)


def publish_version(build: Path, store: ObjectStore, manifest: Manifest, made_of: str) -> None:
    """Puts a finished version beside the others: whole, or not at all; StorageError where it cannot be written.

    `build` is a local folder with its files and no manifest; it is gone afterwards where it could be renamed.
    """
    fingerprint = manifest.fingerprint
    version = store.child(fingerprint)
    if not version.exists(manifests.FILE_NAME):
        (build / manifests.FILE_NAME).write_bytes(manifest.to_bytes())
        if version.folder is None or not move_folder(build, version.folder):
            # In a bucket what is there is of the same contents, for they name it; a folder may be anybody's.
            version.upload(build, last=[manifests.FILE_NAME], resume=version.folder is None)
    _list_last(store, Version(fingerprint=fingerprint, made_of=made_of, created=manifest.created))


def make_newest(store: ObjectStore, version: Version) -> bool:
    """Lists a version that is there as the newest, which runs take; tells whether it was another one."""
    if list_versions(store)[-1].fingerprint == version.fingerprint:
        return False
    _list_last(store, version)
    return True


def _list_last(store: ObjectStore, version: Version) -> None:
    def change(content: bytes | None) -> bytes:
        known = [] if content is None else _parsed(content, store.url_of(INDEX))
        kept = [asdict(each) for each in known if each.made_of != version.made_of]
        return (json.dumps({"versions": [*kept, asdict(version)]}, indent=2) + "\n").encode()

    store.atomic_update(INDEX, change)
