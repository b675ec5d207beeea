"""Rows of tables as records: Parquet files, ArrayRecord files, and folders that `datasets.save_to_disk` wrote.

Hugging Face files are read by pyarrow, as streams, because `datasets` would first copy remote files to the local disk.
Features that `datasets` would decode (images, audio) keep their stored form.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, override

from jaxinfra.config import Problem
from jaxinfra.config.limits import NonEmptyStr
from jaxinfra.errors import ConfigError, DataError
from jaxinfra.packages import import_optional
from jaxinfra.prepare.sources.files import FileSource, damaged_file, split_files
from jaxinfra.prepare.sources.record import BadRecord, Record, Records, Source, SourceShard, parse_record
from jaxinfra.prepare.sources.text import parse_json_object, parse_text
from jaxinfra.storage.errors import cause_of
from jaxinfra.storage.files import FileInfo, display_url, is_local, list_files, local_path, open_file

if TYPE_CHECKING:
    from pyarrow import RecordBatch
    from pyarrow.parquet import ParquetFile

_BATCH_ROWS = 128
# Reads through a small buffer instead of whole column chunks, because a row group may be larger than memory.
_PARQUET_OPTIONS = {"pre_buffer": False, "buffer_size": 1 << 20, "page_checksum_verification": True}
# The default reads 16 MiB ahead in every thread of a pool.
_ARRAY_RECORD_OPTIONS = "readahead_buffer_size:1M,max_parallelism:0"
_DICT_FILE, _STATE_FILE = "dataset_dict.json", "state.json"
_ARROW_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"  # pyarrow does not notice if a stream is cut before it


@dataclass(frozen=True, kw_only=True)
class Parquet(FileSource):
    """Rows of Parquet files, which are split between row groups; page checksums are verified where a file has them.

    Attributes:
        columns: columns to read; () reads all.
    """

    pattern: str = "**/*.parquet"
    columns: tuple[NonEmptyStr, ...] = ()

    @override
    def problems(self) -> Iterable[Problem]:
        yield from super().problems()
        if len(set(self.columns)) < len(self.columns):
            yield Problem(fields=("columns",), message="names a column twice", fix="use columns=() to read all columns")

    @override
    def _length(self, file: FileInfo) -> int:
        with open_parquet(self.root, file.name) as table:
            return table.num_row_groups

    @override
    def read(self, shard: SourceShard) -> Records:
        with open_parquet(self.root, shard.name) as table:
            require_columns(self.columns, table.schema_arrow.names, f"{display_url(self.root)}/{shard.name}")
            for batch, row in read_row_groups(table, shard, self.columns):
                yield from read_rows(batch, shard.name, range(row, row + batch.num_rows))


@dataclass(frozen=True, kw_only=True)
class HuggingFace(Source):
    """Rows of a `Dataset`, or of one split of a `DatasetDict`; only local files are split into shards.

    Attributes:
        path: folder or URL that `save_to_disk` wrote to.
        split: split to read; None if there is only one.
    """

    path: NonEmptyStr = ""
    split: NonEmptyStr | None = None

    def problems(self) -> Iterable[Problem]:
        """Yields what is wrong with the fields."""
        if set("/*?[") & set(self.split or ""):
            yield Problem(fields=("split",), message="is not the name of a split", fix="use split=train")

    @override
    def list_shards(self, shard_bytes: int) -> Sequence[SourceShard]:
        return split_files(self._files(), self._num_rows, shard_bytes)

    @override
    def read(self, shard: SourceShard) -> Records:
        first = 0  # row of the file with which the batch begins
        with self._open_batches(shard.name) as batches:
            for batch in batches:
                end = first + batch.num_rows
                start_row, end_row = max(first, shard.start), end if shard.end is None else min(end, shard.end)
                if start_row < end_row:
                    rows = range(start_row, end_row)
                    yield from read_rows(batch.slice(start_row - first, len(rows)), shard.name, rows)
                first = end
                if shard.end is not None and first >= shard.end:
                    return

    def _files(self) -> list[FileInfo]:
        """Lists the Arrow files of the split."""
        place, folder = display_url(self.path), ""
        if is_local(self.path) and not os.path.isdir(local_path(self.path, "")):
            fix = 'for a dataset of the Hub run load_dataset("NAME").save_to_disk("FOLDER") first, and use path=FOLDER'
            raise ConfigError(f"path={place}: no such folder; {fix}")
        names = {file.name for file in list_files(self.path, "*.json")}
        if _DICT_FILE in names:
            splits = self._read_json(_DICT_FILE)["splits"]
            split = splits[0] if self.split is None and len(splits) == 1 else self.split
            if split not in splits:
                fix = f"use split={splits[0] if splits else 'none'}"
                raise ConfigError(f"split={split or 'none'}: {place} has the splits {', '.join(splits)}; {fix}")
            folder = f"{split}/"
        elif self.split is not None:
            raise ConfigError(f"split={self.split}: {place} has no splits; use split=none")
        elif _STATE_FILE not in names:
            raise ConfigError(f"path={place}: has no {_STATE_FILE}; use a folder that datasets.save_to_disk wrote")
        state = self._read_json(folder + _STATE_FILE)
        if state.get("_indices_data_files"):
            raise ConfigError(f"path={place}: selects its rows by an index; save dataset.flatten_indices() instead")
        files = {file.name: file for file in list_files(self.path, f"{folder}*")}
        listed = sorted(folder + item["filename"] for item in state["_data_files"])
        if missing := [name for name in listed if name not in files]:
            raise DataError(f"{place}/{missing[0]}: is missing, but {folder}{_STATE_FILE} lists it; restore the file")
        return [files[name] for name in listed]

    def _read_json(self, name: str) -> dict[str, Any]:
        with open_file(self.path, name) as file:
            try:
                return json.load(file)
            except ValueError as error:
                raise damaged_file(f"{display_url(self.path)}/{name}", str(error)) from None

    def _num_rows(self, file: FileInfo) -> int:
        if not is_local(self.path):
            return 1
        with self._open_batches(file.name) as batches:
            return sum(batch.num_rows for batch in batches)

    @contextmanager
    def _open_batches(self, name: str) -> Iterator[Iterable["RecordBatch"]]:
        """Opens the record batches of a file; a local file is memory-mapped, so skipping batches reads little."""
        with _open_for_arrow(self.path, name, "huggingface") as (pa, file):
            file.seek(-min(len(_ARROW_END), file.seek(0, os.SEEK_END)), os.SEEK_END)
            if file.read() != _ARROW_END:
                fix = "restore the file or save the dataset again"
                raise DataError(f"{display_url(self.path)}/{name}: is cut short; {fix}")
            file.seek(0)
            source = pa.memory_map(local_path(self.path, name)) if is_local(self.path) else file
            with pa.ipc.open_stream(source) as batches:
                yield batches


@dataclass(frozen=True, kw_only=True)
class ArrayRecords(FileSource):
    """Records of ArrayRecord files (Grain, TFDS), which must be on a local disk.

    Attributes:
        decode: "json" parses an object, "text" decodes UTF-8 to `{"text": str}`, "bytes" gives `{"bytes": bytes}`.
    """

    pattern: str = "**/*.array_record*"
    decode: Literal["json", "text", "bytes"] = "json"

    @override
    def problems(self) -> Iterable[Problem]:
        yield from super().problems()
        if "://" in self.root and not self.root.startswith("file://"):
            message = "ArrayRecord files must be on a local disk"
            yield Problem(fields=("root",), message=message, fix="use root=PATH, or convert them to Parquet")

    @override
    def _length(self, file: FileInfo) -> int:
        with self._open(file.name) as reader:
            return reader.num_records()

    @override
    def read(self, shard: SourceShard) -> Records:
        parsers = {"json": parse_json_object, "text": parse_text, "bytes": lambda content: {"bytes": content}}
        parse = parsers[self.decode]
        with self._open(shard.name) as reader:
            if indices := range(reader.num_records())[shard.start : shard.end]:
                reader.seek(shard.start)
            for index in indices:
                key, location = f"{shard.name}#{index}", f"{shard.name} record {index}"
                yield parse_record(parse, reader.read(), key=key, location=location)

    @contextmanager
    def _open(self, name: str) -> Iterator[Any]:
        name_of_module = "array_record.python.array_record_module"
        module = import_optional(name_of_module, needed_by=self.root, install="jaxinfra[arrayrecord]")
        path = local_path(self.root, name)
        try:
            # Opens the file first, because the library reads a missing or unreadable file as an empty one.
            with open_file(self.root, name), closing(module.ArrayRecordReader(path, _ARRAY_RECORD_OPTIONS)) as reader:
                if not reader.ok():
                    raise RuntimeError(f"or cut short: it has {os.path.getsize(path)} bytes")
                yield reader
        except (RuntimeError, IndexError) as error:
            raise damaged_file(path, str(error).partition("; ")[0]) from error


def require_columns(columns: Sequence[str], names: Sequence[str], place: str) -> None:
    """Raises ConfigError if the file or table `place`, which has the columns `names`, lacks one of `columns`."""
    if missing := [column for column in columns if column not in names]:
        fix = f"use some of its columns: {', '.join(names) or 'it has none'}"
        raise ConfigError(f"columns={columns}: {place} has no {', '.join(missing)}; {fix}")


@contextmanager
def open_parquet(root: str, name: str, extra: str = "parquet") -> Iterator["ParquetFile"]:
    """Opens a Parquet file; raises as `_open_for_arrow`."""
    with (
        _open_for_arrow(root, name, extra) as (pa, file),
        pa.parquet.ParquetFile(file, **_PARQUET_OPTIONS) as table,
    ):
        yield table


def read_row_groups(
    table: "ParquetFile", shard: SourceShard, columns: Sequence[str]
) -> Iterator[tuple["RecordBatch", int]]:
    """Yields small batches of the row groups of a shard, each with the number of its first row.

    `columns` are those to read; () reads all.
    """
    row = sum(table.metadata.row_group(group).num_rows for group in range(shard.start))
    groups, names = range(table.num_row_groups)[shard.start : shard.end], list(columns) or None
    for batch in table.iter_batches(_BATCH_ROWS, row_groups=groups, columns=names, use_threads=False):
        yield batch, row
        row += batch.num_rows


@contextmanager
def _open_for_arrow(root: str, name: str, extra: str) -> Iterator[tuple[ModuleType, BinaryIO]]:
    """Yields the module pyarrow and an open file; DataError if pyarrow cannot read the file.

    `extra` is the extra of jaxinfra that installs pyarrow, for the message if it is missing.
    """
    path = f"{display_url(root)}/{name}"
    pa = import_optional("pyarrow", "parquet", needed_by=path, install=f"jaxinfra[{extra}]")
    with open_file(root, name) as file:
        try:
            yield pa, file
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # an error of the storage; pyarrow's own, for damaged files, have no errno
            raise damaged_file(path, cause_of(error)) from error


def read_rows(batch: "RecordBatch", name: str, numbers: Sequence[int]) -> Records:
    """Yields the rows of a record batch, which have these numbers in the file."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError) as error:  # text that is not UTF-8, or a time that Python cannot represent
        if batch.num_rows == 1:
            cause = f"has a value that Python cannot represent: {str(error).partition('\n')[0]}"
            yield BadRecord(location=f"{name} row {numbers[0]}", cause=cause)
        else:  # reads row by row to find the bad ones
            for index, number in enumerate(numbers):
                yield from read_rows(batch.slice(index, 1), name, [number])
        return
    for number, row in zip(numbers, rows, strict=True):
        yield Record(key=f"{name}#{number}", location=f"{name} row {number}", fields=row)
