"""Lists and reads files in folders, S3, Azure, Hugging Face, HTTP and everything else that fsspec has a package for.

Names are relative to the root, with slashes, and sorted. A folder that cannot be listed is an error, never skipped.
Every function raises ConfigError if no package reads the URL or it has credentials in it, and StorageError if a file or
folder is missing or cannot be read. Messages contain no credentials.
"""

import io
import os
import re
import sysconfig
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NotRequired, TypedDict, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from jaxinfra.errors import ConfigError, DataError
from jaxinfra.packages import install_command
from jaxinfra.storage.credentials import has_credentials, mask_credentials
from jaxinfra.storage.errors import storage_errors

STDLIB = "stdlib"  # as a root: the standard library of the running Python
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__"})
_GLOB_CHARS = frozenset("*?[")
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "hf": "huggingface"}  # of pyproject.toml by protocol
_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs"})  # one request lists everything below a prefix
# Keys under which the file systems report something that changes when a file is replaced.
_VERSION_KEYS = ("ETag", "etag", "generation", "md5Hash", "mtime", "LastModified", "updated", "modified", "created")
_BLOCK_BYTES = 4 << 20  # read ahead from remote storage; the default of s3fs is 50 MiB
_BUFFER_BYTES = 1 << 20


class _Entry(TypedDict):
    """The entry of a file or folder in fsspec; other keys depend on the file system."""

    name: str
    type: str
    size: int
    islink: NotRequired[bool]
    mtime: NotRequired[float]


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    """A listed file."""

    name: str  # relative to the root, with slashes
    size_bytes: int  # as stored, compressed or not
    stamp: str  # changes when the file is replaced


def display_url(root: str) -> str:
    """Returns the root without the user, password and query of a URL, for messages."""
    return mask_credentials(root.partition("?")[0] if "://" in root else root)


def is_local(root: str) -> bool:
    """Returns whether the root is a folder on this machine."""
    return isinstance(file_system(root)[0], LocalFileSystem)


def local_path(root: str, name: str) -> str:
    """Returns the path of a file below a local root."""
    return f"{file_system(root)[1]}/{name}"


def list_files(root: str, pattern: str) -> list[FileInfo]:
    """Lists the files below the root with relative names that match, sorted by name; reads no file.

    Links to files are followed, links to folders are not. Raises ConfigError if there is no such folder, or no file
    matches, and DataError for a name that is not UTF-8.

    Args:
        root: a folder, a URL, or the word `stdlib`.
        pattern: as for `pathlib.Path.glob`; `**` matches any number of folders.
    """
    fs, base = file_system(root)
    prefix = base.rstrip("/")
    parts = PurePosixPath(pattern).parts
    # Lists from the deepest folder that the pattern names without wildcards: for "a/b/*/*.txt", two levels of a/b.
    num_fixed = next((i for i, part in enumerate(parts) if _GLOB_CHARS & set(part)), len(parts) - 1)
    max_depth = None if "**" in parts else len(parts) - num_fixed
    with _listing(root):
        if isinstance(fs, LocalFileSystem):
            if os.path.isfile(base):
                raise ConfigError(f"root={root}: is a file; use its folder, and set the pattern (now {pattern})")
            os.scandir(base).close()  # raises if the folder is missing or cannot be listed
        else:
            fs.invalidate_cache()
        entries = list(_walk(fs, "/".join((prefix, *parts[:num_fixed])) or "/", max_depth))
    regex = re.compile(glob_translate("/".join(parts)))
    files = []
    for entry in entries:
        name = entry["name"][len(prefix) + 1 :]
        if regex.match(name) and not (root == STDLIB and _NOT_STDLIB & set(name.split("/"))):
            _require_utf8(root, name)
            version = next((str(value) for key in _VERSION_KEYS if (value := entry.get(key))), "").strip('"')
            files.append(FileInfo(name=name, size_bytes=entry["size"], stamp=f"{entry['size']}:{version}"))
    if not files:
        raise ConfigError(f"pattern={pattern}: matches no file in {display_url(root)}; change the pattern or the root")
    return sorted(files, key=lambda file: file.name)


def list_folders(root: str) -> list[str]:
    """Returns the sorted names of the folders directly below the root; raises ConfigError if that is not a folder."""
    fs, base = file_system(root)
    with _listing(root):
        fs.invalidate_cache()
        entries = cast(list[_Entry], fs.ls(base, detail=True))
    paths = (entry["name"].rstrip("/") for entry in entries if entry["type"] == "directory")
    names = sorted(path.rpartition("/")[2] for path in paths if path != base.rstrip("/"))
    for name in names:
        _require_utf8(root, name)
    return names


@contextmanager
def open_file(root: str, name: str) -> Iterator[BinaryIO]:
    """Opens a file below the root as a seekable stream; StorageError covers reads inside the block, too."""
    fs, base = file_system(root)
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
    """Reads a small file from a path or URL; `what` names it in the error, such as "a template"."""
    fs, fs_path = file_system(path, field="")
    missing = f"{display_url(path)}: cannot be read as {what}: no such file; correct the path"
    with storage_errors(display_url(path), action=f"read as {what}", missing=missing):
        return cast(bytes, fs.cat_file(fs_path))


def file_exists(path: str) -> bool:
    """Returns whether a path or URL is a file."""
    fs, fs_path = file_system(path, field="")
    with storage_errors(display_url(path), action="read"):
        return fs.exists(fs_path)


def upload_file(path: Path, url: str) -> None:
    """Copies a local file into a bucket in parts, however long it is; raises StorageError if that fails."""
    fs, target = file_system(url, field="")
    with storage_errors(url):
        fs.put_file(str(path), target)


def file_system(root: str, *, field: str = "root=") -> tuple[fsspec.AbstractFileSystem, str]:
    """Returns the file system of a root and the path within it; ConfigError with `field` if there is none."""
    if root == STDLIB:
        return LocalFileSystem(), sysconfig.get_path("stdlib")
    if "://" not in root:
        return LocalFileSystem(), os.path.abspath(os.path.expanduser(root))
    protocol, url = root.partition("://")[0], f"{field}{display_url(root)}"
    if has_credentials(root):  # clients would repeat them in their errors
        raise ConfigError(f"{url}: has credentials in it; set them in the environment or a profile")
    try:
        fs, path = fsspec.url_to_fs(root)
    except ImportError:
        extra = _EXTRAS.get(protocol)
        fix = (
            f"run {install_command(f'jaxinfra[{extra}]')}" if extra else f"install the fsspec package for {protocol}://"
        )
        raise ConfigError(f"{url}: no installed package reads {protocol}://; {fix}") from None
    except ValueError:
        raise ConfigError(f"{url}: {protocol}:// is unknown; use a path, s3:// or gs://") from None
    return cast(fsspec.AbstractFileSystem, fs), path


def _require_utf8(root: str, name: str) -> None:
    """Raises DataError for a name that records and messages cannot hold."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DataError(f"{display_url(root)}: the name {os.fsencode(name)} is not UTF-8; rename it") from None


def _listing(root: str) -> AbstractContextManager[None]:
    missing = f"root={display_url(root)}: no such folder; use the folder that contains the files"
    return storage_errors(display_url(root), action="read", missing=missing)


def _walk(fs: fsspec.AbstractFileSystem, folder: str, max_depth: int | None) -> Iterator[_Entry]:
    """Yields the files at most `max_depth` levels below a folder (None: all); a missing local folder has no files."""
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)  # one name, or a tuple of them
    if max_depth is None and protocols & _OBJECT_STORES:
        entries = cast(dict[str, _Entry], fs.find(folder, detail=True)).values()
        yield from (entry for entry in entries if entry["type"] == "file")
        return
    try:
        entries = cast(list[_Entry], fs.ls(folder, detail=True))
    except (FileNotFoundError, NotADirectoryError):
        if not isinstance(fs, LocalFileSystem):
            raise
        return
    for entry in entries:
        path = entry["name"].rstrip("/")
        if entry.get("islink"):
            if os.path.isfile(entry["name"]):
                entry["mtime"] = os.stat(entry["name"]).st_mtime
                yield entry
        elif entry["type"] == "file":
            yield entry
        # Some stores list a folder as an entry of itself.
        elif entry["type"] == "directory" and max_depth != 1 and path != folder:
            yield from _walk(fs, path, None if max_depth is None else max_depth - 1)
