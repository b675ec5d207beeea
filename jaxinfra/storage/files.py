"""Lists and reads files at any place that fsspec has a package for: folders, S3, Azure, Hugging Face, HTTP and more.

It knows neither records nor formats. Names are relative to the root, with slashes, and sorted. A folder that may not
be listed is an error, never passed over. No message has credentials in it. All functions raise ConfigError for a URL
that nothing is installed for, and StorageError for what may not or cannot be read or listed, or is gone.
"""

import io
import os
import re
import sysconfig
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from jaxinfra.errors import ConfigError
from jaxinfra.storage.credentials import mask_credentials
from jaxinfra.storage.errors import storage_errors

STDLIB = "stdlib"  # the root that stands for the running Python's standard library
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__"})
_GLOB = frozenset("*?[")
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
_FLAT = frozenset(_EXTRAS) | {"az", "abfs"}  # stores that list all that is below a prefix by one query
_VERSIONS = ("ETag", "etag", "generation", "md5Hash", "mtime", "LastModified", "updated", "modified", "created")
_BLOCK_BYTES = 4 << 20  # of a store, read ahead: s3fs alone takes 50 MiB
_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    """A file that was listed."""

    name: str  # relative to the root, with slashes
    size_bytes: int  # as it is stored, compressed or not
    stamp: str  # changes when the file is replaced


def display_url(root: str) -> str:
    """The root without what may be secret in a URL: user, password and query."""
    return mask_credentials(root.partition("?")[0] if "://" in root else root)


def is_local(root: str) -> bool:
    """Tells whether the root is a folder of this machine."""
    return isinstance(_file_system(root)[0], LocalFileSystem)


def local_path(root: str, name: str) -> str:
    """The path of a file below a local root."""
    return f"{_file_system(root)[1]}/{name}"


def list_files(root: str, pattern: str) -> list[FileInfo]:
    """The files below the root whose relative names match, sorted by name.

    Links to files are followed, links to folders are not. Reads no file. ConfigError where there is no such folder, or
    nothing in it matches.

    Args:
        root: a folder, a URL, or the word `stdlib`.
        pattern: as for `pathlib.Path.glob`; `**` stands for any folders.
    """
    fs, base = _file_system(root)
    parts = PurePosixPath(pattern).parts
    fixed = next((i for i, part in enumerate(parts) if _GLOB & set(part)), len(parts) - 1)
    depth = None if "**" in parts else len(parts) - fixed
    with _listing(root):
        if isinstance(fs, LocalFileSystem):
            if os.path.isfile(base):
                raise ConfigError(f"root={root}: is a file; give its folder, and set the pattern (now {pattern})")
            os.scandir(base).close()
        else:
            fs.invalidate_cache()
        files = list(_below(fs, "/".join((base.rstrip("/"), *parts[:fixed])) or "/", depth))
    matches = re.compile(glob_translate("/".join(parts))).match
    skip = len(base.rstrip("/")) + 1
    found = [
        FileInfo(name=name, size_bytes=info["size"], stamp=f"{info['size']}:{_version(info)}")
        for info in files
        if matches(name := info["name"][skip:])
    ]
    if root == STDLIB:
        found = [file for file in found if not _NOT_STDLIB & set(file.name.split("/"))]
    if not found:
        raise ConfigError(f"pattern={pattern}: matches no file in {display_url(root)}; mend the pattern or the root")
    return sorted(found, key=lambda file: file.name)


def list_folders(root: str) -> list[str]:
    """Returns the sorted names of the folders directly below the root; ConfigError where that is no folder."""
    fs, base = _file_system(root)
    with _listing(root):
        fs.invalidate_cache()
        infos = fs.ls(base, detail=True)
    paths = (info["name"].rstrip("/") for info in infos if info["type"] == "directory")
    return sorted(path.rpartition("/")[2] for path in paths if path != base.rstrip("/"))


@contextmanager
def open_file(root: str, name: str) -> Iterator[BinaryIO]:
    """Opens a file below the root for reading; it can be sought in. What fails while it is read is translated too."""
    fs, base = _file_system(root)
    with storage_errors(f"{display_url(root)}/{name}", action="read"):
        path = f"{base.rstrip('/')}/{name}"
        if isinstance(fs, LocalFileSystem):
            with open(path, "rb", buffering=_BUFFER_BYTES) as file:
                yield file
        else:
            remote = cast(io.RawIOBase, fs.open(path, "rb", block_size=_BLOCK_BYTES))
            with io.BufferedReader(remote, _BUFFER_BYTES) as file:
                yield file


def read_file(path: str, what: str) -> bytes:
    """Returns the bytes of a small file that a recipe names, by its path or URL; `what` it should be, for the error."""
    fs, place = _file_system(path, field="")
    missing = f"{display_url(path)}: cannot be read as {what}: no such file; mend the path"
    with storage_errors(display_url(path), action=f"read as {what}", missing=missing):
        return cast(bytes, fs.cat_file(place))


def file_exists(path: str) -> bool:
    """Tells whether there is such a file."""
    fs, place = _file_system(path, field="")
    with storage_errors(display_url(path), action="looked for"):
        return fs.exists(place)


def _file_system(root: str, *, field: str = "root=") -> tuple[fsspec.AbstractFileSystem, str]:
    if root == STDLIB:
        return LocalFileSystem(), sysconfig.get_path("stdlib")
    protocol = root.partition("://")[0] if "://" in root else None
    if protocol is None:
        return LocalFileSystem(), os.path.abspath(os.path.expanduser(root))
    try:
        fs, path = fsspec.url_to_fs(root)
    except ImportError:
        extra = _EXTRAS.get(protocol)
        fix = f"run pip install 'jaxinfra[{extra}]'" if extra else f"install what fsspec reads {protocol}:// with"
        raise ConfigError(f"{field}{display_url(root)}: nothing installed reads {protocol}://; {fix}") from None
    except ValueError:
        raise ConfigError(
            f"{field}{display_url(root)}: {protocol}:// is not known; use a path, s3:// or gs://"
        ) from None
    return cast(fsspec.AbstractFileSystem, fs), path


def _listing(root: str) -> AbstractContextManager[None]:
    missing = f"root={display_url(root)}: no such folder; give the folder that holds the files"
    return storage_errors(display_url(root), action="read", missing=missing)


def _below(fs: fsspec.AbstractFileSystem, folder: str, depth: int | None) -> Iterator[dict[str, Any]]:
    """What fsspec says of the files down to a depth below a folder; nothing when there is no such folder."""
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    if depth is None and protocols & _FLAT:
        found = cast(dict[str, dict[str, Any]], fs.find(folder, detail=True))
        yield from (info for info in found.values() if info["type"] == "file")
        return
    try:
        infos = fs.ls(folder, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        if not isinstance(fs, LocalFileSystem):
            raise
        return
    for info in infos:
        if info.get("islink"):
            if os.path.isfile(info["name"]):
                yield info | {"mtime": os.stat(info["name"]).st_mtime}
        elif info["type"] == "file":
            yield info
        elif info["type"] == "directory" and depth != 1 and info["name"].rstrip("/") != folder:
            yield from _below(fs, info["name"].rstrip("/"), depth and depth - 1)


def _version(info: dict[str, Any]) -> str:
    return str(next((info[key] for key in _VERSIONS if info.get(key)), "")).strip('"')
