"""Files that a command writes where the user says, on a disk or in a bucket: checked first, written at the end."""

from pathlib import Path

from jaxinfra.errors import ConfigError
from jaxinfra.storage import outputs
from jaxinfra.storage.location import is_remote
from jaxinfra.storage.objects import ObjectStore


def check_writable(path: str) -> None:
    """Raises StorageError if a file cannot be written, or its bucket cannot be read; ConfigError for a wrong URL."""
    if is_remote(path):
        store, name = _object_at(path)
        store.exists(name)
    else:
        outputs.check_writable(Path(path))


def write_text(path: str, text: str) -> None:
    """Writes a file atomically; raises StorageError if that fails."""
    if is_remote(path):
        store, name = _object_at(path)
        store.write(name, text.encode())
    else:
        outputs.write_text(Path(path), text)


def _object_at(url: str) -> tuple[ObjectStore, str]:
    parent, _, name = url.rpartition("/")
    if not name or parent.endswith("/"):
        raise ConfigError(f"{url}: names no file in a bucket; use a URL such as s3://BUCKET/FILE")
    return ObjectStore(parent), name
