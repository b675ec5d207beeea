"""What sources of files have in common: checks of their fields, and pieces of files.

The files themselves are listed and read by `jaxinfra.storage.files`.
"""

from collections.abc import Iterable
from pathlib import PurePosixPath

from jaxinfra.config import Problem
from jaxinfra.prepare.sources.record import Piece
from jaxinfra.storage.files import File


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
