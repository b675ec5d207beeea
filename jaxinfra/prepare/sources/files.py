"""Base class of sources that read files, and the splitting of files into shards.

`jaxinfra.storage.files` lists and opens the files.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePosixPath
from typing import override

from jaxinfra.config import Problem
from jaxinfra.config.limits import NonEmptyStr
from jaxinfra.errors import DataError
from jaxinfra.prepare.sources.record import Source, SourceShard
from jaxinfra.storage.files import FileInfo, list_files


@dataclass(frozen=True, kw_only=True)
class FileSource(Source):
    """Files below a root.

    Attributes:
        root: folder or URL.
        pattern: which files below the root, as in `pathlib.Path.glob`.
    """

    root: NonEmptyStr = ""
    pattern: str = "**/*"

    def problems(self) -> Iterable[Problem]:
        """Yields what is wrong with the fields."""
        parts = self.pattern.split("/")
        if not self.pattern or PurePosixPath(self.pattern).is_absolute() or ".." in parts:
            message = "must be a pattern relative to the root"
        elif any("**" in part and part != "**" for part in parts):
            message = "** matches whole folder names only, so it must stand alone between slashes"
        else:
            return
        yield Problem(fields=("pattern",), message=message, fix=f"use pattern={type(self).pattern}")

    @override
    def list_shards(self, shard_bytes: int) -> Sequence[SourceShard]:
        return split_files(list_files(self.root, self.pattern), self._length, shard_bytes)

    def _length(self, file: FileInfo) -> int:
        """Returns the number of bytes, rows or records between which a file may be split; 1: it is not split."""
        return 1


def split_files(files: Iterable[FileInfo], length: Callable[[FileInfo], int], shard_bytes: int) -> list[SourceShard]:
    """Splits files into equal shards of about `shard_bytes`; opens only large ones, by calling `length`.

    A file of 25 bytes and 100 rows gives 3 shards for `shard_bytes` 8, with the bounds 0, 33, 66 and None (the end).
    """
    shards = []
    for file in files:
        count = max(1, round(file.size_bytes / max(1, shard_bytes)))
        total = length(file) if count > 1 else 1
        count = max(1, min(count, total))
        bounds = [*(total * index // count for index in range(count)), None]
        size_bytes = file.size_bytes // count
        shards += [
            SourceShard(name=file.name, start=start or 0, end=end, size_bytes=size_bytes, stamp=file.stamp)
            for start, end in pairwise(bounds)
        ]
    return shards


def damaged_file(path: str, cause: str) -> DataError:
    """Returns the error for a file that its format cannot read."""
    return DataError(f"{path}: is damaged ({cause}); restore the file or make it again")
