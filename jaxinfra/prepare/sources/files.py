"""What sources of files have in common: their fields and what may be wrong with them, and pieces of files.

The files themselves are listed and read by `jaxinfra.storage.files`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePosixPath
from typing import override

from jaxinfra.config import Problem
from jaxinfra.config.limits import NonEmpty
from jaxinfra.errors import DataError
from jaxinfra.prepare.sources.record import Piece, Source
from jaxinfra.storage.files import FileInfo, list_files


@dataclass(frozen=True, kw_only=True)
class Files(Source):
    """Files below a root, as the sources of each kind of file read them.

    Attributes:
        root: folder or URL that holds the files.
        pattern: which files below the root, as in `pathlib.Path.glob`.
    """

    root: NonEmpty = ""
    pattern: str = "**/*"

    def problems(self) -> Iterable[Problem]:
        """Yields what is wrong with the description itself."""
        parts = self.pattern.split("/")
        if not self.pattern or PurePosixPath(self.pattern).is_absolute() or ".." in parts:
            message = "must be a pattern relative to the root"
        elif any("**" in part and part != "**" for part in parts):
            message = "** stands for folders and must be alone between slashes"
        else:
            return
        yield Problem(fields=("pattern",), message=message, fix=f"use pattern={type(self).pattern}")

    @override
    def pieces(self, split_bytes: int) -> Sequence[Piece]:
        return cut(list_files(self.root, self.pattern), self._count, split_bytes)

    def _count(self, file: FileInfo) -> int:
        """Returns of how many bytes, rows or records a file is, between which it is cut; 1 if it is not cut."""
        return 1


def cut(files: Iterable[FileInfo], count: Callable[[FileInfo], int], split_bytes: int) -> list[Piece]:
    """Cuts files into equal pieces of about `split_bytes`; `count` tells the bytes, rows or records of large ones."""
    pieces = []
    for file in files:
        parts = max(1, round(file.size_bytes / max(1, split_bytes)))
        total = count(file) if parts > 1 else 1
        parts = max(1, min(parts, total))
        bounds = [*(total * part // parts for part in range(parts)), None]
        pieces += [
            Piece(name=file.name, start=start or 0, end=end, size_bytes=file.size_bytes // parts, stamp=file.stamp)
            for start, end in pairwise(bounds)
        ]
    return pieces


def damaged(where: str, cause: str) -> DataError:
    """Returns the error for a file that is not what it should be."""
    return DataError(f"{where}: is damaged ({cause}); restore the file or make it again")
