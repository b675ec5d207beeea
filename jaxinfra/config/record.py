"""The record of a run, `run.json`: what was run, from where, with what, so that it can be replayed.

A record holds the whole config, not the path to one, and names the root class; reading it needs neither the
config file nor the command line. It is written once, at once: a reader sees the old file or the new one.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jaxinfra.config.classes import RESTORE, ClassFinder, source_of, users_classes
from jaxinfra.config.codec import decode, encode
from jaxinfra.config.extensible import class_name
from jaxinfra.config.schema import is_config
from jaxinfra.config.text import show
from jaxinfra.errors import ConfigError
from jaxinfra.storage.atomic import write_bytes_atomic
from jaxinfra.storage.errors import storage_errors

FORMAT = 1  # the record format that this version writes; it reads this one and older ones


@dataclass(frozen=True, kw_only=True)
class Loaded[C]:
    """A config with its overrides applied."""

    run: C  # the root object
    source: str  # the file that it came from, as it was named
    origins: dict[str, str]  # for each leaf that differs from the default of its class, `file:<path>` or `command line`


def record(
    loaded: Loaded[Any],
    *,
    command: Sequence[str],
    versions: dict[str, Any],
    git: dict[str, Any],
    devices: list[Any] | dict[str, Any],
) -> dict[str, Any]:
    """Returns the JSON-able record of a run: `versions` by package, `git` the source tree's state."""
    return {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "source": loaded.source,
        "root": class_name(type(loaded.run)),
        "config": encode(loaded.run),
        "classes": {class_name(each): source_of(each) for each in users_classes(loaded.run)},
        "origins": dict(loaded.origins),
        "versions": versions,
        "git": git,
        "devices": devices,
    }


def write_record(path: str | os.PathLike[str], record: dict[str, Any]) -> None:
    """Replaces the file at `path` by a record; StorageError where it cannot be written: an older one is untouched."""
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    with storage_errors(path):
        write_bytes_atomic(Path(path), text.encode())


def read_record(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a record; StorageError where the file cannot be read.

    ConfigError where there is no such file, or it is not a record, or a newer version wrote it.
    """
    missing = f"{path}: no such run record; name a run.json that a run wrote"
    try:
        with storage_errors(path, action="read", missing=missing):
            text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a run record, it is not UTF-8 text; restore the file") from error
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: broken JSON, {error.msg}; restore the file") from error
    version = found.get("format") if isinstance(found, dict) else None
    if type(version) is not int:
        raise ConfigError(f"{path}: not a run record, it has no format; name a run.json that a run wrote")
    if version > FORMAT:
        raise ConfigError(
            f"{path}: format={version} is newer than the {FORMAT} that this version reads; upgrade jaxinfra"
        )
    for key in ("root", "config"):
        if key not in found:
            raise ConfigError(f"{path}: not a run record, it has no {key}; restore the file")
    return found


def decode_record[C](
    path: str | os.PathLike[str], record: dict[str, Any], root: type[C] | None = None, finder: ClassFinder | None = None
) -> C:
    """Rebuilds the config object of a record that `read_record` has read from `path`.

    ConfigError where a class is not found, or the stored config does not fit it. `root` is the class that is
    expected, if the caller knows it; it need not be importable then. Without a `finder`, users' classes are refused.
    """
    finder = finder or ClassFinder()
    named = str(record["root"])
    try:
        cls = root if root is not None and named == class_name(root) else finder.find(named)
    except ConfigError as error:
        raise ConfigError(f"{path}: root={error}") from error
    if not is_config(cls):
        raise ConfigError(f"{path}: root={show(named)} is not a config class; restore the file")
    try:
        return decode(cls, record["config"], finder)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def require_classes(
    path: str | os.PathLike[str], record: dict[str, Any], finder: ClassFinder, *, same_sources: bool
) -> None:
    """Finds the users' classes of a record; ConfigError where one is missing, or its file differs."""
    classes = record.get("classes", {})
    if not isinstance(classes, dict) or not all(map(_is_source, classes.values())):
        raise ConfigError(f"{path}: the classes in it are damaged; restore the file")
    for name, source in classes.items():
        try:
            now = source_of(finder.find(name, file=source["file"]))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        if same_sources and now["sha256"] != source["sha256"]:
            hashes = f"SHA-256 {source['sha256']} then, {now['sha256']} now"
            raise ConfigError(f"{path}: {now['file']} has changed since the run used its {name} ({hashes}); {RESTORE}")


def _is_source(source: object) -> bool:
    """Tells whether a part of a record has the form that `source_of` returns."""
    if not isinstance(source, dict) or source.keys() != {"file", "sha256"}:
        return False
    return all(value is None or (isinstance(value, str) and value.isprintable()) for value in source.values())
