"""Finds and opens the files of a source, in a local folder or in whatever store fsspec has a package for.

It knows neither records nor formats. Names are relative to the root, with slashes, and sorted. A folder that may not
be listed is an error, never passed over. No message has credentials in it.
"""

import io
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from jaxinfra.config import Problem
from jaxinfra.errors import ConfigError, JaxinfraError, StorageError
from jaxinfra.prepare.sources.record import Piece

STDLIB = "stdlib"
"""The root that stands for the running Python's standard library."""
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__"})
_GLOB = frozenset("*?[")
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
_FLAT = frozenset(_EXTRAS) | {"az", "abfs"}  # stores that list all that is below a prefix by one query
_CLIENTS = frozenset({"aiobotocore", "aiohttp", "botocore", "gcsfs", "google", "s3fs"})
_VERSIONS = ("ETag", "etag", "generation", "md5Hash", "mtime", "LastModified", "updated", "modified", "created")
_BLOCK_BYTES = 4 << 20  # of a store, read ahead: s3fs alone takes 50 MiB
_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class File:
    """A file that was listed.

    Attributes:
        name: relative to the root, with slashes.
        size_bytes: as it is stored, compressed or not.
        stamp: changes when the file is replaced.
    """

    name: str
    size_bytes: int
    stamp: str


def problems_of(root: str, pattern: str, example: str) -> Iterable[Problem]:
    """Yields what is wrong with the fields `root` and `pattern` of a source."""
    if not root:
        yield Problem(
            fields=("root",), message="names no folder", fix="use root=PATH or a URL such as s3://bucket/text"
        )
    parts = pattern.split("/")
    if not pattern or PurePosixPath(pattern).is_absolute() or ".." in parts:
        message = "must be a pattern relative to the root"
    elif any("**" in part and part != "**" for part in parts):
        message = "** stands for folders and must be alone between slashes"
    else:
        return
    yield Problem(fields=("pattern",), message=message, fix=f"use pattern={example}")


def shown(root: str) -> str:
    """The root without what may be secret in a URL: user, password and query."""
    return re.sub(r"\?.*", "", re.sub(r"(?<=://)[^/@]*@", "", root)) if "://" in root else root


def is_local(root: str) -> bool:
    """Whether the root is a folder of this machine.

    Raises:
        ConfigError: the root is a URL that nothing is installed for.
    """
    return isinstance(_file_system(root)[0], LocalFileSystem)


def local_path(root: str, name: str) -> str:
    """The path of a file below a local root."""
    return f"{_file_system(root)[1]}/{name}"


def list_files(root: str, pattern: str) -> list[File]:
    """The files below the root whose relative names match, sorted by name.

    Links to files are followed, links to folders are not. Reads no file.

    Args:
        root: a folder, a URL, or the word `stdlib`.
        pattern: as for `pathlib.Path.glob`; `**` stands for any folders.

    Raises:
        ConfigError: there is no such folder, or nothing in it matches.
        StorageError: a folder may not or cannot be listed.
    """
    fs, base = _file_system(root)
    parts = PurePosixPath(pattern).parts
    fixed = next((i for i, part in enumerate(parts) if _GLOB & set(part)), len(parts) - 1)
    depth = None if "**" in parts else len(parts) - fixed
    with translated(shown(root), missing=f"root={shown(root)}: no such folder; give the folder that holds the files"):
        if isinstance(fs, LocalFileSystem):
            _require_folder(root, base, pattern)
        else:
            fs.invalidate_cache()
        files = list(_below(fs, "/".join((base.rstrip("/"), *parts[:fixed])) or "/", depth))
    matches = re.compile(glob_translate("/".join(parts))).match
    skip = len(base.rstrip("/")) + 1
    named = ((info["name"][skip:], info) for info in files)
    found = [_listed(name, info) for name, info in named if matches(name)]
    if root == STDLIB:
        found = [file for file in found if not _NOT_STDLIB & set(file.name.split("/"))]
    if not found:
        raise ConfigError(f"pattern={pattern}: matches no file in {shown(root)}; mend the pattern or the root")
    return sorted(found, key=lambda file: file.name)


def list_names(root: str) -> list[str]:
    """The sorted names of the folders that are directly below the root.

    Raises:
        ConfigError: there is no such folder.
        StorageError: it may not or cannot be listed.
    """
    fs, base = _file_system(root)
    with translated(shown(root), missing=f"root={shown(root)}: no such folder; give the folder that holds the files"):
        fs.invalidate_cache()
        infos = fs.ls(base, detail=True)
    paths = (info["name"].rstrip("/") for info in infos if info["type"] == "directory")
    return sorted(path.rpartition("/")[2] for path in paths if path != base.rstrip("/"))


@contextmanager
def opened(root: str, name: str) -> Iterator[BinaryIO]:
    """Opens a file below the root for reading; it can be sought in.

    Raises:
        StorageError: it may not or cannot be read, or is gone; also while it is read.
    """
    fs, base = _file_system(root)
    with translated(f"{shown(root)}/{name}"):
        path = f"{base.rstrip('/')}/{name}"
        if isinstance(fs, LocalFileSystem):
            with open(path, "rb", buffering=_BUFFER_BYTES) as file:
                yield file
        else:
            remote = cast(io.RawIOBase, fs.open(path, "rb", block_size=_BLOCK_BYTES))
            with io.BufferedReader(remote, _BUFFER_BYTES) as file:
                yield file


@contextmanager
def translated(where: str, missing: str | None = None) -> Iterator[None]:
    """Turns what a file system or the client of a store raises into errors of ours.

    Raises:
        StorageError: of anything that was raised inside, with one line of its cause.
        ConfigError: something was not found, and `missing` says what that means.
    """
    try:
        yield
    except JaxinfraError:
        raise
    except FileNotFoundError:
        if missing:
            raise ConfigError(missing) from None
        raise StorageError(f"{where}: is gone; it was there when the files were listed: start again") from None
    except PermissionError as error:
        path = shown(error.filename) if isinstance(error.filename, str) else where
        raise StorageError(f"{path}: permission denied; make it readable or leave it out by the pattern") from None
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__module__.split(".")[0] not in _CLIENTS:
            raise
        cause = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
        raise StorageError(f"{where}: cannot be read ({cause}); check the disk or the store") from error


def whole(file: File) -> Piece:
    """The piece that is a whole file."""
    return Piece(name=file.name, size_bytes=file.size_bytes, stamp=file.stamp)


def cut(file: File, count: int, split_bytes: int) -> list[Piece]:
    """Cuts a file into about equal ranges of its `count` bytes, rows or records, each of about `split_bytes`."""
    parts = min(parts_of(file.size_bytes, split_bytes), count)
    if parts <= 1:
        return [whole(file)]
    bounds: list[int | None] = [count * part // parts for part in range(parts)]
    return [
        Piece(name=file.name, start=start or 0, end=end, size_bytes=file.size_bytes // parts, stamp=file.stamp)
        for start, end in zip(bounds, [*bounds[1:], None], strict=True)
    ]


def parts_of(size_bytes: int, split_bytes: int) -> int:
    """Into how many parts of about `split_bytes` so many bytes are cut; at least 1."""
    return max(1, round(size_bytes / max(1, split_bytes)))


@cache
def _stdlib() -> str:
    return sysconfig.get_path("stdlib")


def _file_system(root: str) -> tuple[fsspec.AbstractFileSystem, str]:
    if root == STDLIB:
        return LocalFileSystem(), _stdlib()
    protocol = root.partition("://")[0] if "://" in root else None
    if protocol is None:
        return LocalFileSystem(), os.path.abspath(os.path.expanduser(root))
    try:
        fs, path = fsspec.url_to_fs(root)
    except ImportError:
        extra = _EXTRAS.get(protocol)
        fix = f"run pip install 'jaxinfra[{extra}]'" if extra else f"install what fsspec reads {protocol}:// with"
        raise ConfigError(f"root={shown(root)}: nothing installed reads {protocol}://; {fix}") from None
    except ValueError:
        raise ConfigError(f"root={shown(root)}: {protocol}:// is not known; use a path, s3:// or gs://") from None
    return cast(fsspec.AbstractFileSystem, fs), path


def _require_folder(root: str, base: str, pattern: str) -> None:
    if os.path.isfile(base):
        raise ConfigError(f"root={root}: is a file; give its folder, and set the pattern (now {pattern})")
    with os.scandir(base):
        pass


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


def _listed(name: str, info: dict[str, Any]) -> File:
    version = next((info[key] for key in _VERSIONS if info.get(key)), "")
    return File(name=name, size_bytes=info["size"], stamp=f"{info['size']}:{str(version).strip('"')}")
