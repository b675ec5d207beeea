"""Every row of a table is a record: of Parquet or ArrayRecord files, or of what `datasets.save_to_disk` wrote.

The last are read by pyarrow, as streams: `datasets` would first copy the files of a store to the local disk. What it
decodes (images, audio) is given as it is stored.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, override

from jaxinfra.config import Problem
from jaxinfra.config.limits import NonEmpty
from jaxinfra.errors import ConfigError, DataError
from jaxinfra.packages import import_optional
from jaxinfra.prepare.sources.files import Files, cut, damaged
from jaxinfra.prepare.sources.record import Bad, Found, Piece, Source, read_as
from jaxinfra.prepare.sources.text import json_object, text_record
from jaxinfra.storage.errors import cause_of
from jaxinfra.storage.files import FileInfo, display_url, is_local, list_files, local_path, open_file

_BATCH_ROWS = 128
# Parquet is read ahead by a buffer, not by whole column chunks: a row group may be larger than memory.
_PARQUET = {"pre_buffer": False, "buffer_size": 1 << 20, "page_checksum_verification": True}
# The default reads 16 MiB ahead in every thread of a pool.
_ARRAY_RECORD = "readahead_buffer_size:1M,max_parallelism:0"
_DICT, _STATE = "dataset_dict.json", "state.json"
_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"  # of an Arrow stream; without it pyarrow reads a cut file as a shorter one


@dataclass(frozen=True, kw_only=True)
class Parquet(Files):
    """Rows of Parquet files, cut between row groups; checksums of pages are checked where a file has them.

    Attributes:
        columns: the columns to read; none are all.
    """

    pattern: str = "**/*.parquet"
    columns: tuple[NonEmpty, ...] = ()

    @override
    def problems(self) -> Iterable[Problem]:
        yield from super().problems()
        if len(set(self.columns)) < len(self.columns):
            yield Problem(fields=("columns",), message="has a name twice", fix="use columns=() to read all columns")

    @override
    def _count(self, file: FileInfo) -> int:
        with self._opened(file.name) as table:
            return table.num_row_groups

    @override
    def read(self, piece: Piece) -> Iterator[Found | Bad]:
        with self._opened(piece.name) as table:
            names = table.schema_arrow.names
            if missing := [column for column in self.columns if column not in names]:
                raise ConfigError(
                    f"columns={self.columns}: {display_url(self.root)}/{piece.name} has no {', '.join(missing)}; "
                    f"it has {', '.join(names) or 'none'}"
                )
            row = sum(table.metadata.row_group(group).num_rows for group in range(piece.start))
            groups = range(table.num_row_groups)[piece.start : piece.end]
            columns = list(self.columns) or None
            for batch in table.iter_batches(_BATCH_ROWS, row_groups=groups, columns=columns, use_threads=False):
                yield from _records(batch, piece.name, row)
                row += batch.num_rows

    @contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        with _arrow_file(self.root, name, "parquet") as (_, file):
            from pyarrow.parquet import ParquetFile

            with ParquetFile(file, **_PARQUET) as table:
                yield table


@dataclass(frozen=True, kw_only=True)
class HuggingFace(Source):
    """Rows of a `Dataset`, or of one split of a `DatasetDict`. Files of a store are not cut.

    Attributes:
        path: folder or URL that `save_to_disk` wrote to.
        split: name of the split; None where there are no splits, or one.
    """

    path: NonEmpty = ""
    split: NonEmpty | None = None

    def problems(self) -> Iterable[Problem]:
        """Yields what is wrong with the description itself."""
        if set("/*?[") & set(self.split or ""):
            yield Problem(fields=("split",), message="is no name of a split", fix="use split=train")

    @override
    def pieces(self, split_bytes: int) -> Sequence[Piece]:
        return cut(self._files(), self._rows, split_bytes)

    @override
    def read(self, piece: Piece) -> Iterator[Found | Bad]:
        first = 0
        with self._batches(piece.name) as batches:
            for batch in batches:
                count = batch.num_rows
                start = max(0, piece.start - first)
                end = count if piece.end is None else min(count, piece.end - first)
                if start < end:
                    yield from _records(batch.slice(start, end - start), piece.name, first + start)
                first += count
                if piece.end is not None and first >= piece.end:
                    return

    def _files(self) -> list[FileInfo]:
        here, folder = display_url(self.path), ""
        names = {file.name for file in list_files(self.path, "*.json")}
        if _DICT in names:
            splits = self._json(_DICT)["splits"]
            split = splits[0] if self.split is None and len(splits) == 1 else self.split
            if split not in splits:
                fix = f"use split={splits[0] if splits else 'none'}"
                raise ConfigError(f"split={split or 'none'}: {here} has {', '.join(splits)}; {fix}")
            folder = f"{split}/"
        elif self.split is not None:
            raise ConfigError(f"split={self.split}: {here} has no splits; use split=none")
        elif _STATE not in names:
            raise ConfigError(f"path={here}: has no {_STATE}; give a folder that datasets.save_to_disk wrote")
        state = self._json(folder + _STATE)
        if state.get("_indices_data_files"):
            raise ConfigError(f"path={here}: its rows are chosen by an index; save dataset.flatten_indices() instead")
        files = {file.name: file for file in list_files(self.path, f"{folder}*")}
        wanted = sorted(folder + item["filename"] for item in state["_data_files"])
        if missing := [name for name in wanted if name not in files]:
            raise DataError(f"{here}/{missing[0]}: is missing, {folder}{_STATE} names it; restore the file")
        return [files[name] for name in wanted]

    def _json(self, name: str) -> dict[str, Any]:
        with open_file(self.path, name) as file:
            try:
                return json.load(file)
            except ValueError as error:
                raise DataError(f"{display_url(self.path)}/{name}: is damaged ({error}); restore the file") from None

    def _rows(self, file: FileInfo) -> int:
        if not is_local(self.path):
            return 1
        with self._batches(file.name) as batches:
            return sum(batch.num_rows for batch in batches)

    @contextmanager
    def _batches(self, name: str) -> Iterator[Iterable[Any]]:
        """Opens the record batches of a file; a local one is mapped, so passing over them reads little."""
        with _arrow_file(self.path, name, "huggingface") as (pa, file):
            file.seek(-min(len(_END), file.seek(0, 2)), 2)
            if file.read() != _END:
                fix = "restore the file or save the dataset again"
                raise DataError(f"{display_url(self.path)}/{name}: is cut short; {fix}")
            file.seek(0)
            source = pa.memory_map(local_path(self.path, name)) if is_local(self.path) else file
            with pa.ipc.open_stream(source) as batches:
                yield batches


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
    def _count(self, file: FileInfo) -> int:
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
        module = import_optional(
            "array_record.python.array_record_module", needed_by=self.root, install="jaxinfra[arrayrecord]"
        )
        path = local_path(self.root, name)
        try:
            # Opened first: the library reads a missing file, one that it may not read, as an empty one.
            with open_file(self.root, name), closing(module.ArrayRecordReader(path, _ARRAY_RECORD)) as reader:
                if not reader.ok():
                    raise RuntimeError(f"or cut short: it has {os.path.getsize(path)} bytes")
                yield reader
        except (RuntimeError, IndexError) as error:
            raise damaged(path, str(error).partition("; ")[0]) from error


@contextmanager
def _arrow_file(root: str, name: str, extra: str) -> Iterator[tuple[Any, BinaryIO]]:
    """Gives pyarrow, which is installed by an extra of jaxinfra, and an open file; what it cannot read is DataError."""
    where = f"{display_url(root)}/{name}"
    pa = import_optional("pyarrow", needed_by=where, install=f"jaxinfra[{extra}]")
    with open_file(root, name) as file:
        try:
            yield pa, file
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise damaged(where, cause_of(error)) from error


def _records(batch: Any, name: str, first: int) -> Iterator[Found | Bad]:
    """Yields the rows of a record batch, of which the first one has the number `first` in the file."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError) as error:  # text that is not UTF-8, times that Python has not: find the rows
        if batch.num_rows == 1:
            cause = f"has no value that Python can hold: {str(error).partition('\n')[0]}"
            yield Bad(where=f"{name} row {first}", cause=cause)
        else:
            for index in range(batch.num_rows):
                yield from _records(batch.slice(index, 1), name, first + index)
        return
    for index, row in enumerate(rows, first):
        yield Found(key=f"{name}#{index}", where=f"{name} row {index}", record=row)
