"""Tables with snapshots, Apache Iceberg and Delta Lake: the rows that a table had at one snapshot.

Their libraries say which Parquet files a snapshot has, which rows of them are deleted, and which columns the table has.
The files are read like those of `Parquet`: as streams, split between row groups, in the order of their names. A row
keeps its number in its file, and so its key, when other rows are deleted.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Self, override
from urllib.parse import unquote

import numpy as np

from jaxinfra.config import Problem
from jaxinfra.config.limits import NonEmptyStr, NonNegativeInt
from jaxinfra.errors import ConfigError, DataError, JaxinfraError, StorageError
from jaxinfra.packages import import_optional
from jaxinfra.prepare.sources.files import split_files
from jaxinfra.prepare.sources.record import Records, Source, SourceShard
from jaxinfra.prepare.sources.tables import open_parquet, read_row_groups, read_rows, require_columns
from jaxinfra.storage.errors import cause_of, storage_errors
from jaxinfra.storage.files import FileInfo, display_url, file_system

if TYPE_CHECKING:
    from deltalake import DeltaTable
    from pyarrow import RecordBatch
    from pyarrow.parquet import ParquetFile
    from pyiceberg.table import Table

_FILES = {"py-io-impl": "pyiceberg.io.fsspec.FsspecFileIO"}
"""Pyiceberg reads buckets with the clients of all other sources, which take what the same variables say."""

_NOISE = re.compile("\x1b\\[\\d*m\u21b3?|[\\s:]+0: <unknown>.*", re.DOTALL)  # colors and stacks of deltalake

type ToTable = Callable[["RecordBatch"], "RecordBatch"]
"""Makes the columns of a table from those of a file."""


class Snapshot(ABC):
    """One snapshot of a table, as its library has read it.

    Attributes:
        number: the ID of a snapshot of Iceberg, the version of Delta.
        table_id: tells the table from another one that took its place.
        columns: names of all columns.
        files: URL and bytes of each data file, by its name in messages and keys.
    """

    number: int
    table_id: str
    columns: Sequence[str]
    files: Mapping[str, tuple[str, int]]

    @abstractmethod
    def deleted(self, name: str) -> np.ndarray:
        """Returns the numbers of the deleted rows of a data file, sorted: int64[rows]."""

    @abstractmethod
    def columns_of(self, name: str, file: "ParquetFile", columns: Sequence[str]) -> tuple[Sequence[str], ToTable]:
        """Returns the columns to read of a data file, and the function that makes `columns` of the table from them."""


@dataclass(frozen=True, kw_only=True)
class _SnapshotTable(Source):
    """Reads the rows of a snapshot: `pin` is the field that names it, `extra` the extra with its library."""

    pin: ClassVar[str]
    extra: ClassVar[str]
    table: NonEmptyStr = ""
    columns: tuple[NonEmptyStr, ...] = ()

    def problems(self) -> Iterable[Problem]:
        """Yields what is wrong with the fields."""
        if len(set(self.columns)) < len(self.columns):
            yield Problem(fields=("columns",), message="names a column twice", fix="use columns=() to read all columns")

    @abstractmethod
    def open(self) -> Snapshot:
        """Opens the snapshot, or the newest one; raises as `list_shards`."""

    @override
    def pinned(self) -> Self:
        return self if getattr(self, self.pin) is not None else replace(self, **{self.pin: self.open().number})

    @override
    def list_shards(self, shard_bytes: int) -> Sequence[SourceShard]:
        snapshot = self.open()
        require_columns(self.columns, snapshot.columns, self.place)
        stamp = f"{snapshot.table_id}:{snapshot.number}"  # a snapshot never changes
        files = [
            FileInfo(name=name, size_bytes=size, stamp=stamp) for name, (_, size) in sorted(snapshot.files.items())
        ]

        def num_row_groups(file: FileInfo) -> int:
            with self._open_file(snapshot, file.name) as table:
                return table.num_row_groups

        return split_files(files, num_row_groups, shard_bytes)

    @override
    def read(self, shard: SourceShard) -> Records:
        snapshot = _open_once(self, shard.stamp)
        with self._open_file(snapshot, shard.name) as file:
            deleted = snapshot.deleted(shard.name)
            columns, to_table = snapshot.columns_of(shard.name, file, self.columns or snapshot.columns)
            for batch, first in read_row_groups(file, shard, columns):
                start, end = np.searchsorted(deleted, [first, first + batch.num_rows])
                kept = np.delete(np.arange(batch.num_rows), deleted[start:end] - first)
                rows = batch if len(kept) == batch.num_rows else batch.take(kept)
                yield from read_rows(to_table(rows), shard.name, (first + kept).tolist())

    @property
    def place(self) -> str:
        """The table, for messages."""
        return display_url(self.table)

    @contextmanager
    def _open_file(self, snapshot: Snapshot, name: str) -> Iterator["ParquetFile"]:
        root, _, file = snapshot.files[name][0].rpartition("/")
        try:
            with open_parquet(root, file, self.extra) as table:
                yield table
        except StorageError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            raise DataError(
                f"{self.pin}={snapshot.number}: {self.place} has no {name}; if this {self.pin} has expired, use "
                f"source.{self.pin}=none for the newest; otherwise restore the file"
            ) from error

    @contextmanager
    def _library_errors(self, *missing: str, fix: str | None = None) -> Iterator[None]:
        """Names the table in the errors of its library.

        Args:
            missing: classes of errors that mean that there is no such table.
            fix: what to do if storage or the catalog fails; None derives it from the cause.
        """
        try:
            no_table = f"table={self.place}: no such table; correct the path"
            with storage_errors(self.place, action="read", missing=no_table, fix=fix):
                yield
        except JaxinfraError:
            raise
        except Exception as error:  # catalogs raise those of their clients
            if type(error).__name__ == "NotInstalledError":  # a package for this kind of catalog
                raise ConfigError(f"{self.place}: {cause_of(error)}") from error
            if type(error).__name__ in missing:
                raise ConfigError(f"table={self.place}: no such table ({cause_of(error)}); correct its name") from error
            if isinstance(error, ValueError | KeyError) or type(error).__name__ == "ValidationError":
                mend = "write the table in a form that it reads, or restore it"
                raise DataError(f"{self.place}: its library cannot read it ({cause_of(error)}); {mend}") from error
            raise StorageError(f"{self.place}: cannot be read: {cause_of(error)}; {fix or 'start again'}") from error


@lru_cache(maxsize=4)
def _open_once(source: _SnapshotTable, stamp: str) -> Snapshot:
    """Opens the snapshot of shards with this stamp, once in a process."""
    return source.open()


@dataclass(frozen=True, kw_only=True)
class Iceberg(_SnapshotTable):
    """Rows of an Apache Iceberg table at a snapshot.

    Attributes:
        table: `NAMESPACE.NAME` in the catalog. Without one the path or URL of a `*.metadata.json`, or of the folder of
            a table with a `version-hint.text`.
        columns: columns to read; () reads all.
        catalog: name of the catalog in the settings of pyiceberg: `.pyiceberg.yaml`, or `PYICEBERG_CATALOG__NAME__URI`.
        snapshot: ID of the snapshot; None takes the newest one, and the manifest of the store says which.
    """

    pin = "snapshot"
    extra = "iceberg"
    catalog: NonEmptyStr | None = None
    snapshot: NonNegativeInt | None = None

    @override
    def open(self) -> Snapshot:
        import_optional("pyiceberg", "io.pyarrow", needed_by=f"table={self.place}", install="jaxinfra[iceberg]")
        missing, named = ("NoSuchTableError", "NoSuchNamespaceError", "NoSuchIdentifierError"), self.catalog or ""
        fix = f"start again when catalog={named} answers, or correct PYICEBERG_CATALOG__{named.upper()}__URI"
        with self._library_errors(*missing, fix=fix if named else None):
            table = self._load()
            number = table.metadata.current_snapshot_id if self.snapshot is None else self.snapshot
            known = [each.snapshot_id for each in table.metadata.snapshots]
            if not known:
                raise ConfigError(f"table={self.place}: has no snapshot yet; append rows to it first")
            if number not in known:
                fix = f"use source.snapshot={known[-1]}"
                raise ConfigError(f"snapshot={number}: {self.place} has no such snapshot, or it has expired; {fix}")
            return _IcebergSnapshot(table, number)

    def _load(self) -> "Table":
        from pyiceberg.catalog import load_catalog
        from pyiceberg.table import StaticTable

        if self.catalog is None:
            fs, path = file_system(self.table, field="table=")
            if not path.endswith(".metadata.json") and not fs.exists(f"{path}/metadata/version-hint.text"):
                files = [name.rpartition("/")[2] for name in fs.ls(f"{path}/metadata", detail=False)]
                newest = max((name for name in files if name.endswith(".metadata.json")), default="FILE.metadata.json")
                raise ConfigError(
                    f"table={self.place}: has no metadata/version-hint.text, so only its catalog knows the newest; use "
                    f"source.catalog=NAME, or source.table={self.place}/metadata/{newest}"
                )
            return StaticTable.from_metadata(self.table if "://" in self.table else f"file://{path}", _FILES)
        try:
            catalog = load_catalog(self.catalog, **_FILES)
        except ValueError as error:
            fix = f"set PYICEBERG_CATALOG__{self.catalog.upper()}__URI, or write it into .pyiceberg.yaml"
            raise ConfigError(f"catalog={self.catalog}: cannot be opened ({cause_of(error)}); {fix}") from error
        with closing(catalog):
            if "." not in self.table:
                raise ConfigError(f"table={self.table}: has no namespace; use source.table=NAMESPACE.{self.table}")
            return catalog.load_table(self.table)


class _IcebergSnapshot(Snapshot):
    def __init__(self, table: "Table", number: int):
        scan = table.scan(snapshot_id=number)
        prefix = f"{table.location()}/"
        self._tasks = {task.file.file_path.removeprefix(prefix): task for task in scan.plan_files()}
        self._io, self._metadata, self._schema = table.io, table.metadata, scan.projection()
        self.number, self.table_id = number, str(table.metadata.table_uuid)
        self.columns = [field.name for field in self._schema.fields]
        self.files = {name: (task.file.file_path, task.file.file_size_in_bytes) for name, task in self._tasks.items()}
        if others := [name for name, task in self._tasks.items() if task.file.file_format.value != "PARQUET"]:
            raise ValueError(f"{others[0]} is no Parquet file")

    @override
    def deleted(self, name: str) -> np.ndarray:
        from pyiceberg.io.pyarrow import _read_deletes

        task = self._tasks[name]
        read = [_read_deletes(self._io, file) for file in task.delete_files]
        positions = [rows[task.file.file_path].to_numpy() for rows in read if task.file.file_path in rows]
        return np.unique(np.concatenate([np.empty(0, np.int64), *positions]))

    @override
    def columns_of(self, name: str, file: "ParquetFile", columns: Sequence[str]) -> tuple[Sequence[str], ToTable]:
        from pyiceberg.io.pyarrow import _get_column_projection_values, _to_requested_schema, pyarrow_to_schema
        from pyiceberg.schema import prune_columns

        metadata, data_file = self._metadata, self._tasks[name].file
        version = metadata.format_version
        downcast = version <= 2  # which have no nanoseconds
        wanted = self._schema.select(*columns)
        stored = pyarrow_to_schema(
            file.schema_arrow, metadata.name_mapping(), downcast_ns_timestamp_to_us=downcast, format_version=version
        )
        spec = metadata.specs().get(data_file.spec_id)
        values = _get_column_projection_values(data_file, wanted, metadata.schema(), spec, stored.field_ids)
        read = prune_columns(stored, wanted.field_ids, select_full_types=False)

        def to_table(batch: "RecordBatch") -> "RecordBatch":
            return _to_requested_schema(
                wanted,
                read,
                batch,
                downcast_ns_timestamp_to_us=downcast,
                projected_missing_fields=values,
                allow_timestamp_tz_mismatch=True,
            )

        return [field.name for field in read.fields], to_table


@dataclass(frozen=True, kw_only=True)
class Delta(_SnapshotTable):
    """Rows of a Delta Lake table at a version.

    Attributes:
        table: folder or URL of the table.
        columns: columns to read; () reads all.
        version: version of the table; None takes the newest one, and the manifest of the store says which.
    """

    pin = "version"
    extra = "delta"
    version: NonNegativeInt | None = None

    @override
    def open(self) -> Snapshot:
        library = import_optional("deltalake", needed_by=f"table={self.place}", install="jaxinfra[delta]")
        _, path = file_system(self.table, field="table=")
        url, options = self.table if "://" in self.table else path, {"allow_http": "true"}  # if the endpoint says http
        with self._library_errors("TableNotFoundError"):
            try:
                return _DeltaSnapshot(library.DeltaTable(url, self.version, options), url)
            except OSError as error:
                raise OSError(_NOISE.sub("", str(error))) from error
            except (OverflowError, library.exceptions.DeltaError) as error:
                if self.version is None:
                    if isinstance(error, library.exceptions.TableNotFoundError):
                        raise
                    raise ValueError(_NOISE.sub("", str(error))) from error
                newest = library.DeltaTable(url, None, options).version()
                cause = "this version has expired" if self.version <= newest else "there is no such version"
                raise ConfigError(
                    f"version={self.version}: {cause} of {self.place}; use source.version={newest}"
                ) from error


class _DeltaSnapshot(Snapshot):
    def __init__(self, table: "DeltaTable", url: str):
        import pyarrow as pa

        metadata = table.metadata()
        if metadata.configuration.get("delta.columnMapping.mode", "none") != "none":
            raise ValueError("it maps its columns to other names in the files")
        self._schema = pa.schema(table.schema())
        self.number, self.table_id, self.columns = table.version(), str(metadata.id), self._schema.names
        actions = pa.table(table.get_add_actions(flatten=True)).to_pylist()
        self._actions = {unquote(action["path"]): action for action in actions}
        self.files = {
            name: (name if "://" in name else f"{url}/{name}", action["size_bytes"])
            for name, action in self._actions.items()
        }
        self._deleted = {
            path.as_py().removeprefix(table.table_uri): np.flatnonzero(~np.array(kept.values, bool))
            for batch in pa.RecordBatchReader.from_stream(table.deletion_vectors())
            for path, kept in zip(*batch.columns, strict=True)
        }

    @override
    def deleted(self, name: str) -> np.ndarray:
        return self._deleted.get(self._actions[name]["path"], np.empty(0, np.int64))

    @override
    def columns_of(self, name: str, file: "ParquetFile", columns: Sequence[str]) -> tuple[Sequence[str], ToTable]:
        import pyarrow as pa

        action, stored = self._actions[name], [column for column in columns if column in file.schema_arrow.names]

        def to_table(batch: "RecordBatch") -> "RecordBatch":
            arrays = []
            for column in columns:  # those of partitions are not in files, nor are those that were added later
                value = pa.scalar(action.get(f"partition.{column}"), self._schema.field(column).type)
                arrays.append(batch[column] if column in stored else pa.repeat(value, batch.num_rows))
            return pa.record_batch(arrays, names=list(columns))

        return stored, to_table
