"""The run record, `run.json`: the whole config, the origins of its values, and the environment.

A replay needs nothing else, except the unchanged files of user classes. Their source is not copied into the record: a
record is never executed, and source may contain secrets. Values of secret environment variables are replaced by the
names of the variables: copies of a record are in checkpoints, reports and trackers.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jaxinfra.config.classes import RESTORE, ClassFinder, source_of, user_classes
from jaxinfra.config.codec import complete, decode, encode
from jaxinfra.config.extensible import PACKAGE, class_name
from jaxinfra.config.schema import is_config
from jaxinfra.config.text import error_prefix, shorten, show
from jaxinfra.errors import ConfigError
from jaxinfra.storage.atomic import read_file, write_bytes_atomic
from jaxinfra.storage.credentials import mask_tree
from jaxinfra.storage.errors import storage_errors
from jaxinfra.storage.location import is_remote

FORMAT = 1  # the version of the record format that is written; this and older ones are read
# The fix in messages about a damaged record; RESTORE is the one for the file of a class.
_RESTORE = "restore the file, or delete it: the next start of a run with checkpoints writes it anew"


@dataclass(frozen=True, kw_only=True)
class Loaded[C]:
    """A config with its overrides applied."""

    run: C
    source: str  # the file that it came from, as the user named it
    origins: dict[str, str]  # path of each leaf that differs from its default -> `file:SOURCE` or `command line`


def record(
    loaded: Loaded[Any],
    *,
    command: Sequence[str],
    versions: Mapping[str, Any],
    git: Mapping[str, Any],
    devices: Sequence[Any] | Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the run record; `versions` maps packages to versions, `git` is the state of the source tree."""
    return {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": mask_tree([*command]),
        "folder": os.getcwd(),  # relative paths in the config are relative to it
        "source": loaded.source,
        "root": class_name(type(loaded.run)),
        "config": mask_tree(encode(loaded.run)),
        "classes": {class_name(cls): source_of(cls) for cls in user_classes(loaded.run)},
        "origins": dict(loaded.origins),
        "versions": versions,
        "git": git,
        "devices": devices,
    }


def write_record(path: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    """Replaces the file at `path` atomically; raises StorageError if it cannot be written."""
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    with storage_errors(path):
        write_bytes_atomic(Path(path), text.encode())


def read_record(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a record; raises StorageError, or ConfigError if the file is not a record or has a newer format."""
    missing = f"{path}: no such run record; name a run.json that a run wrote"
    if is_remote(path):
        from jaxinfra.storage.connection import require_server
        from jaxinfra.storage.objects import ObjectStore  # imports TensorStore

        folder, _, name = os.fspath(path).rpartition("/")
        require_server(folder)
        if (text := ObjectStore(folder).read_or_none(name)) is None:
            raise ConfigError(missing)
    else:
        with storage_errors(path, action="read", missing=missing):
            text = read_file(Path(path))
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: broken JSON, {error.msg}; {_RESTORE}") from error
    except (RecursionError, ValueError) as error:  # too deeply nested; not UTF-8, or a number with too many digits
        raise ConfigError(f"{path}: not a run record, {shorten(str(error))}; {_RESTORE}") from error
    version = content.get("format") if isinstance(content, dict) else None
    if type(version) is not int:
        raise ConfigError(f"{path}: not a run record, it has no format; name a run.json that a run wrote")
    if version > FORMAT:
        raise ConfigError(
            f"{path}: format={version} is newer than {FORMAT}, which this version reads; upgrade jaxinfra"
        )
    for key in ("config", "root"):
        if key not in content:
            raise ConfigError(f"{path}: not a run record, it has no {key}; {_RESTORE}")
    return content


def decode_record(path: str | os.PathLike[str], record: Mapping[str, Any], finder: ClassFinder) -> object:
    """Returns the config of a record; raises ConfigError, which names `path`, if a class is not found."""
    name = str(record["root"])  # `read_record` has checked that it is there
    with error_prefix(f"{path}: root="):
        cls = finder.find(name)
    if not is_config(cls):
        raise ConfigError(f"{path}: root={show(name)} is not a config class; {_RESTORE}")
    with error_prefix(f"{path}: "):
        return decode(cls, record["config"], finder)


def config_without_classes(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the encoded config of a record with all fields of now, except in parts of user classes."""
    name, coded = str(record["root"]), record["config"]
    return complete(ClassFinder().find(name), coded) if name.startswith(f"{PACKAGE}.") else coded


def check_classes(path: str | os.PathLike[str], record: Mapping[str, Any], finder: ClassFinder) -> None:
    """Raises ConfigError if a user class of a record is missing, or if its file has changed."""
    classes = record.get("classes", {})
    if not isinstance(classes, dict) or not all(map(_is_source, classes.values())):
        raise ConfigError(f"{path}: the classes in it are damaged; {_RESTORE}")
    for name, source in classes.items():
        with error_prefix(f"{path}: "):
            now = source_of(finder.find(name, file=source["file"]))
        if now["sha256"] != source["sha256"]:
            hashes = f"SHA-256 {source['sha256']} then, {now['sha256']} now"
            raise ConfigError(f"{path}: {now['file']} has changed since the run used its {name} ({hashes}); {RESTORE}")


def _is_source(source: object) -> bool:
    """Tells whether a part of a record has the form that `source_of` returns."""
    if not isinstance(source, dict) or source.keys() != {"file", "sha256"}:
        return False
    # Printable, because messages of one line show the values.
    return all(value is None or (isinstance(value, str) and value.isprintable()) for value in source.values())
