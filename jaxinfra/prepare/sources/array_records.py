"""Every record of ArrayRecord files is a record, its bytes read as JSON, as text or as they are."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from jaxinfra.config import Problem
from jaxinfra.errors import ConfigError, DataError
from jaxinfra.packages import needed
from jaxinfra.prepare.sources.files import cut, problems_of
from jaxinfra.prepare.sources.jsonl import json_object
from jaxinfra.prepare.sources.lines import text_of
from jaxinfra.prepare.sources.record import Bad, Found, Piece, Record
from jaxinfra.storage.files import is_local, list_files, local_path, opened, shown

# The default reads 16 MiB ahead in every thread of a pool.
_OPTIONS = "readahead_buffer_size:1M,max_parallelism:0"


@dataclass(frozen=True, kw_only=True)
class ArrayRecords:
    """Records of ArrayRecord files (of Grain and TFDS), which its library reads from local disks only.

    Attributes:
        root: local folder that holds the files.
        pattern: which files below the root, as in `pathlib.Path.glob`.
        decode: what a record is: `json` an object of that kind; `text` is UTF-8, for a record `{"text": str}`;
            `bytes` gives `{"bytes": bytes}`.
    """

    root: str = ""
    pattern: str = "**/*.array_record*"
    decode: Literal["json", "text", "bytes"] = "json"

    def problems(self) -> Iterable[Problem]:
        """Yields what is wrong with the description itself."""
        yield from problems_of(self.root, self.pattern, "**/*.array_record*")
        if "://" in self.root and not self.root.startswith("file://"):
            yield Problem(
                fields=("root",),
                message="ArrayRecord files are read from a local disk only",
                fix="copy them there and use root=PATH, or keep them as Parquet",
            )

    def pieces(self, split_bytes: int) -> Sequence[Piece]:
        """Ranges of records of the files. Raises as `Source.pieces` does.

        Raises:
            DataError: a file is damaged.
        """
        if not is_local(self.root):
            raise ConfigError(f"root={shown(self.root)}: ArrayRecord files are read from a local disk only; copy them")
        pieces: list[Piece] = []
        for file in list_files(self.root, self.pattern):
            with self._opened(file.name) as reader:
                pieces += cut(file, reader.num_records(), split_bytes)
        return pieces

    def read(self, piece: Piece) -> Iterator[Found | Bad]:
        """Yields the records `piece.start` to `piece.end` of a file. Raises as `Source.read` does."""
        with self._opened(piece.name) as reader:
            end = reader.num_records() if piece.end is None else piece.end
            if piece.start < end:
                reader.seek(piece.start)
            for index in range(piece.start, end):
                where = f"{piece.name} record {index}"
                try:
                    record = self._decoded(reader.read())
                except ValueError as error:
                    yield Bad(where=where, cause=str(error))
                else:
                    yield Found(key=f"{piece.name}#{index}", where=where, record=record)

    def _decoded(self, content: bytes) -> Record:
        if self.decode == "json":
            return json_object(content)
        return {"text": text_of(content)} if self.decode == "text" else {"bytes": content}

    @contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        module = needed("array_record.python.array_record_module", by=self.root, install="jaxinfra[arrayrecord]")
        path = local_path(self.root, name)
        with opened(self.root, name):  # the library reads a missing file, one that it may not read, as an empty one
            reader = module.ArrayRecordReader(path, _OPTIONS)
        try:
            try:
                if not reader.ok():
                    raise RuntimeError(f"or cut short: it has {os.path.getsize(path)} bytes")
                yield reader
            finally:
                reader.close()  # raises again what reading raised
        except (RuntimeError, IndexError) as error:
            cause = str(error).partition("; ")[0]
            raise DataError(f"{path}: is damaged ({cause}); restore the file or make it again") from error
