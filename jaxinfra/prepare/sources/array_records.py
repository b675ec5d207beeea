"""Every record of ArrayRecord files is a record, its bytes read as JSON, as text or as they are."""

import os
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, override

from jaxinfra.config import Problem
from jaxinfra.packages import needed
from jaxinfra.prepare.sources.files import Files, damaged
from jaxinfra.prepare.sources.record import Bad, Found, Piece, read_as
from jaxinfra.prepare.sources.text import json_object, text_record
from jaxinfra.storage.files import File, local_path, opened

# The default reads 16 MiB ahead in every thread of a pool.
_OPTIONS = "readahead_buffer_size:1M,max_parallelism:0"


@dataclass(frozen=True, kw_only=True)
class ArrayRecords(Files):
    """Records of ArrayRecord files (of Grain and TFDS), which its library reads from local disks only.

    Attributes:
        decode: what a record is: `json` an object of that kind; `text` is UTF-8, for a record `{"text": str}`;
            `bytes` gives `{"bytes": bytes}`.
    """

    pattern: str = "**/*.array_record*"
    decode: Literal["json", "text", "bytes"] = "json"

    @override
    def problems(self) -> Iterable[Problem]:
        yield from super().problems()
        if "://" in self.root and not self.root.startswith("file://"):
            message = "ArrayRecord files are read from a local disk only"
            fix = "copy them there and use root=PATH, or keep them as Parquet"
            yield Problem(fields=("root",), message=message, fix=fix)

    @override
    def _count(self, file: File) -> int:
        with self._opened(file.name) as reader:
            return reader.num_records()

    @override
    def read(self, piece: Piece) -> Iterator[Found | Bad]:
        parse = {"json": json_object, "text": text_record, "bytes": lambda content: {"bytes": content}}[self.decode]
        with self._opened(piece.name) as reader:
            if indices := range(reader.num_records())[piece.start : piece.end]:
                reader.seek(piece.start)
            for index in indices:
                key, where = f"{piece.name}#{index}", f"{piece.name} record {index}"
                yield read_as(parse, reader.read(), key=key, where=where)

    @contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        module = needed("array_record.python.array_record_module", by=self.root, install="jaxinfra[arrayrecord]")
        path = local_path(self.root, name)
        try:
            # Opened first: the library reads a missing file, one that it may not read, as an empty one.
            with opened(self.root, name), closing(module.ArrayRecordReader(path, _OPTIONS)) as reader:
                if not reader.ok():
                    raise RuntimeError(f"or cut short: it has {os.path.getsize(path)} bytes")
                yield reader
        except (RuntimeError, IndexError) as error:
            raise damaged(path, str(error).partition("; ")[0]) from error
