"""Tables of Iceberg, in a catalog in SQLite, and of Delta: written, changed and expired by their own libraries."""

import json
import re
import struct
import sys
import zlib
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import deltalake
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyiceberg import catalog as pyiceberg_catalogs
from pyiceberg.catalog import load_catalog
from pyiceberg.manifest import DataFile, DataFileContent, FileFormat, ManifestContent, ManifestWriterV2
from pyiceberg.table.update import snapshot as pyiceberg_commits
from pyiceberg.types import LongType
from pyiceberg.utils.config import Config
from pyroaring import BitMap64

from jaxinfra.data.store.store import TokenStore
from jaxinfra.errors import ConfigError, DataError, StorageError
from jaxinfra.prepare.documents.document import Text
from jaxinfra.prepare.prepare import prepare
from jaxinfra.prepare.sources.snapshots import Delta, Iceberg
from tests.prepare.sources.reading import assert_shards_do_not_matter, found, read_all, shards_of
from tests.refusals import names, raises
from tests.stores import bytes_recipe, documents
from tests.tiny_run import launch

PAGE = (Path(__file__).parents[3] / "docs" / "sources.md").read_text()
ROWS = [{"text": f"row {number} é", "n": number} for number in range(600)]


class IcebergTable:
    """A table of a catalog in SQLite, which is found by its settings in the environment."""

    pin, extra, module = "snapshot", "iceberg", "pyiceberg"

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, place: str | None = None):
        patch.setenv("PYICEBERG_CATALOG__TESTS__URI", f"sqlite:///{folder}/catalog.db")
        patch.setenv("PYICEBERG_CATALOG__TESTS__WAREHOUSE", place or folder.as_uri())
        patch.setattr(pyiceberg_catalogs, "_ENV_CONFIG", Config())  # which is read once in a process
        folder.mkdir(exist_ok=True)
        self.folder = folder / "web" / "pages"
        with self.opened() as catalog:
            catalog.create_namespace("web")
            properties = {"write.parquet.row-group-limit": "100"}
            catalog.create_table("web.pages", pa.Table.from_pylist(ROWS[:1]).schema, properties=properties)
        self.source = Iceberg(catalog="tests", table="web.pages")

    def opened(self):
        return closing(load_catalog("tests", **{"py-io-impl": "pyiceberg.io.fsspec.FsspecFileIO"}))

    def change(self, call):
        with self.opened() as catalog:
            call(table := catalog.load_table("web.pages"))
            return table.current_snapshot().snapshot_id

    def append(self, rows):
        return self.change(lambda table: table.append(pa.Table.from_pylist(rows)))

    def delete(self, rows, content_of_file=DataFileContent.POSITION_DELETES):
        """Deletes these rows of the first file by a file of positions, which pyiceberg reads, but does not write."""

        class Deletes(ManifestWriterV2):
            def content(self):
                return ManifestContent.DELETES

            @property
            def _meta(self):
                return super()._meta | {"content": "deletes"}

        def commit(table):
            (data, *_) = sorted((task.file for task in table.scan().plan_files()), key=lambda file: file.file_path)
            path = f"{table.location()}/data/deletes-{content_of_file}.parquet"
            content = pa.BufferOutputStream()
            pq.write_table(pa.table({"file_path": [data.file_path] * len(rows), "pos": rows}), content)
            with table.io.new_output(path).create() as file:
                file.write(content.getvalue().to_pybytes())
            deletes = DataFile.from_args(
                content=content_of_file,
                file_path=path,
                file_format=FileFormat.PARQUET,
                partition=data.partition,
                record_count=len(rows),
                file_size_in_bytes=len(table.io.new_input(path)),
                spec_id=data.spec_id,
            )
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(pyiceberg_commits, "write_manifest", lambda format_version, **rest: Deletes(**rest))
                with table.transaction() as transaction, transaction.update_snapshot().fast_append() as append:
                    append.append_data_file(deletes)

        return self.change(commit)

    def evolve(self):
        """Adds a column and renames another; returns the next row."""

        def commit(table):
            with table.update_schema() as update:
                update.add_column("score", LongType())
                update.rename_column("n", "number")

        self.change(commit)
        return {"text": "new", "number": 3, "score": 3}

    def expire(self):
        """Deletes what only older snapshots have."""

        def commit(table):
            before = {task.file.file_path for task in table.scan().plan_files()}
            table.overwrite(pa.Table.from_pylist(ROWS[:50]))
            for path in before:
                table.io.delete(path)

        return self.change(commit)


class DeltaTable:
    """A table in a folder or a bucket."""

    pin, extra, module = "version", "delta", "deltalake"

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, place: str | None = None):
        self.folder = folder / "a table"
        self.url = place or str(self.folder)
        self.source = Delta(table=self.url)
        self.properties = {"delta.enableDeletionVectors": "true"}

    @property
    def table(self):
        return deltalake.DeltaTable(self.url, storage_options={"allow_http": "true"})

    def append(self, rows, **options):
        properties = deltalake.WriterProperties(max_row_group_size=100)
        deltalake.write_deltalake(
            self.url,
            pa.Table.from_pylist(rows),
            mode="append",
            configuration=self.properties,
            writer_properties=properties,
            storage_options={"allow_http": "true"},
            **options,
        )
        return self.table.version()

    def delete(self, rows):
        """Deletes these rows of the first file by a deletion vector, which the library reads, but does not write."""
        log, version = self.folder / "_delta_log", self.table.version()
        lines = [line for file in sorted(log.glob("*.json")) for line in file.read_text().splitlines()]
        add = min((json.loads(line)["add"] for line in lines if '"add"' in line), key=lambda add: add["path"])
        bitmap = struct.pack("<I", 1681511377) + BitMap64(rows).serialize()
        vector = self.folder / "vector.bin"
        vector.write_bytes(b"\1" + struct.pack(">I", len(bitmap)) + bitmap + struct.pack(">I", zlib.crc32(bitmap)))
        described = {"storageType": "p", "pathOrInlineDv": vector.as_uri(), "offset": 1, "sizeInBytes": len(bitmap)}
        add["deletionVector"] = described | {"cardinality": len(rows)}
        removed = {name: add[name] for name in ("path", "partitionValues", "size")}
        removed |= {"dataChange": True, "deletionTimestamp": 1, "extendedFileMetadata": True}
        actions = [{"remove": removed}, {"add": add}]
        (log / f"{version + 1:020}.json").write_text("\n".join(map(json.dumps, actions)))
        return version + 1

    def evolve(self):
        self.table.alter.add_columns([deltalake.Field("score", deltalake.schema.PrimitiveType("long"))])
        return {"text": "new", "n": 3, "score": 3}

    def expire(self):
        deltalake.write_deltalake(self.url, pa.Table.from_pylist(ROWS[:50]), mode="overwrite")
        self.table.vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)
        return self.table.version()


KINDS = {"iceberg": IcebergTable, "delta": DeltaTable}


@pytest.fixture(params=KINDS)
def table(request, tmp_path, monkeypatch):
    """An empty table of each kind."""
    return KINDS[request.param](tmp_path, monkeypatch)


def texts(source):
    return sorted(each.fields["text"] for each in found(source))


def at(table, number):
    return replace(table.source, **{table.pin: number})


def test_rows_are_read_once_wherever_files_are_split(table):
    table.append(ROWS[:400])
    table.append(ROWS[400:])
    records = assert_shards_do_not_matter(table.source, [1, 500], most=6)
    assert sorted(each.fields["n"] for each in records) == list(range(600))
    assert {each.key.partition("#")[2] for each in records} == {str(number) for number in range(400)}
    assert found(replace(table.source, columns=("n",)))[0].fields.keys() == {"n"}


def test_deleted_rows_are_left_out_and_others_keep_their_keys(table):
    before = table.append(ROWS)
    after = table.delete([0, 99, 100, 101, 350])
    whole = {each.key: each.fields for each in found(at(table, before))}
    kept = {each.key: each.fields for each in assert_shards_do_not_matter(at(table, after), [1], most=6)}
    assert {int(key.partition("#")[2]) for key in whole.keys() - kept.keys()} == {0, 99, 100, 101, 350}
    assert all(whole[key] == fields for key, fields in kept.items())


def test_a_snapshot_has_the_columns_of_its_time(table):
    first = table.append(ROWS[:3])
    table.append([row := table.evolve()])
    assert [each.fields for each in found(at(table, first))] == ROWS[:3]
    expected = [dict(zip(row, [*old.values(), None], strict=True)) for old in ROWS[:3]]
    rows = sorted((each.fields for each in found(table.source)), key=lambda fields: fields["text"])
    assert rows == [row, *expected]


def test_a_store_is_that_of_its_snapshot_whatever_is_written_later(table, tmp_path, monkeypatch):
    first = table.append(ROWS[:300])
    (content,) = re.findall(r"^```python\n(.*?configs/data/table\.py.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    content = content.replace('Delta(table="tables/pages")', repr(table.source)).replace("import Delta", "import *")
    (tmp_path / "table.py").write_text(content)

    words = ("data", "prepare", str(tmp_path / "table.py"), "tokenizer.vocab_size=300")

    def made(*overrides, store="store"):
        ended = launch(*words, f"store={tmp_path / store}", *overrides)
        assert ended.code == 0, ended
        return ended.out, TokenStore.open(str(tmp_path / store)).manifest

    out, old = made("--workers", "2")
    pinned = f"source.{table.pin}={first}"
    names(out.splitlines()[0], pinned)
    assert old.recipe["source"][table.pin] == first and pinned in old.prepared_from
    second = table.append(ROWS[300:])
    out, new = made("--workers", "1")
    names(out.splitlines()[0], f"source.{table.pin}={second}")
    assert new.fingerprint != old.fingerprint
    assert (len(documents(str(tmp_path / "store"))), new.recipe["source"][table.pin]) == (600, second)
    table.delete([7])
    out, again = made(pinned)
    assert "was there" in out and again.fingerprint == old.fingerprint
    _, elsewhere = made(pinned, store="other")
    assert elsewhere.fingerprint == old.fingerprint


def test_what_is_not_there_is_refused_in_one_line(table, tmp_path):
    with raises(ConfigError, "table= no such table"):
        shards_of(table.source if table.pin == "version" else replace(table.source, table="web.other"))
    table.append(ROWS[:200])
    (empty := tmp_path / "empty").mkdir()
    with raises(ConfigError, "table= empty: no such table"):
        shards_of(type(table.source)(table=str(empty)))
    with raises(ConfigError, f"{table.pin}=77: source.{table.pin}={table.append(ROWS[200:300])}"):
        shards_of(at(table, 77))
    with raises(ConfigError, f"{table.pin}={10**20}: source.{table.pin}="):
        shards_of(at(table, 10**20))
    with raises(ConfigError, "columns= title text, n"):
        shards_of(replace(table.source, columns=("n", "title")))


def test_an_expired_snapshot_is_refused(table):
    first = table.append(ROWS)
    newest = table.expire()
    assert len(found(at(table, newest))) == 50
    with raises(DataError, f"{table.pin}={first}: .parquet source.{table.pin}=none"):
        read_all(at(table, first))


def test_values_that_are_no_text_are_bad_records(table, tmp_path):
    table.append([{"text": "fine", "n": 1}, {"text": None, "n": 2}])
    recipe = bytes_recipe(tmp_path, tmp_path / "store")
    with raises(DataError, ".parquet row 1: text"):
        prepare(replace(recipe, source=table.source), workers=1)
    with raises(DataError, ".parquet row 0: n"):
        prepare(replace(recipe, source=table.source, format=Text(field="n")), workers=1)


def test_the_extra_is_named_where_the_package_is_missing(table, monkeypatch):
    for module in [each for each in sys.modules if each.partition(".")[0] == table.module] + [table.module]:
        monkeypatch.setitem(sys.modules, module, None)
    with raises(ConfigError, f"table= {table.module} [{table.extra}]"):
        shards_of(table.source)


def test_a_table_of_iceberg_without_a_catalog(tmp_path, monkeypatch):
    table = IcebergTable(tmp_path, monkeypatch)
    table.append(ROWS[:10])
    folder = Iceberg(table=str(table.folder))
    with raises(ConfigError, "version-hint.text source.catalog=NAME") as refusal:
        shards_of(folder)
    file = str(refusal.value).rpartition("source.table=")[2]
    assert texts(Iceberg(table=file)) == texts(table.source)
    (table.folder / "metadata" / "version-hint.text").write_text(Path(file).name)
    assert texts(folder) == texts(table.source)
    for table, catalog, named in (
        (str(tmp_path / "nowhere"), None, "table= nowhere no such table"),
        ("web.pages", "others", "catalog=others: PYICEBERG_CATALOG__OTHERS__URI"),
        ("web.others", "tests", "table=web.others: no such table"),
        ("pages", "tests", "table=pages: source.table=NAMESPACE.pages"),
    ):
        with raises(ConfigError, named):
            shards_of(Iceberg(table=table, catalog=catalog))


def test_what_pyiceberg_does_not_read_is_refused(tmp_path, monkeypatch):
    table = IcebergTable(tmp_path, monkeypatch)
    table.append(ROWS[:10])
    first = table.delete([1])
    table.delete([1], DataFileContent.EQUALITY_DELETES)
    with raises(DataError, "web.pages: equality deletes"):
        shards_of(table.source)
    assert len(found(at(table, first))) == 9
    (tmp_path / "damaged.metadata.json").write_text('{"format-version": 9}')
    with raises(DataError, "damaged.metadata.json: format-version"):
        shards_of(Iceberg(table=str(tmp_path / "damaged.metadata.json")))


def test_columns_of_a_partition_are_not_in_the_files(tmp_path, monkeypatch):
    table = DeltaTable(tmp_path, monkeypatch)
    rows = [row | {"day": day, "k": row["n"] % 2} for row in ROWS[:6] for day in ("a é%/b", None)]
    table.append(rows, partition_by=["day", "k"])
    assert sorted(str(each.fields) for each in found(table.source)) == sorted(map(str, rows))


def test_a_version_whose_log_was_cleaned_up_has_expired(tmp_path, monkeypatch):
    table = DeltaTable(tmp_path, monkeypatch)
    for start in range(0, 60, 20):
        table.append(ROWS[start : start + 20])
    newest = deltalake.DeltaTable(table.folder)
    newest.create_checkpoint()
    for log in sorted((table.folder / "_delta_log").glob("*.json"))[:-1]:
        log.unlink()
    assert len(found(table.source)) == 60
    with raises(ConfigError, f"version=0: expired source.version={newest.version()}"):
        shards_of(at(table, 0))


def test_a_damaged_log_is_one_line_without_a_stack(tmp_path, monkeypatch):
    table = DeltaTable(tmp_path, monkeypatch)
    table.append(ROWS[:5])
    (log,) = (table.folder / "_delta_log").glob("*.json")
    log.write_text("no json")
    with raises(DataError, "restore") as refusal:
        shards_of(table.source)
    assert "unknown>" not in str(refusal.value)


def test_what_a_catalog_needs_is_named(tmp_path, monkeypatch):
    table = IcebergTable(tmp_path, monkeypatch)
    with raises(ConfigError, "table=web.pages: no snapshot"):
        shards_of(table.source)
    monkeypatch.setenv("PYICEBERG_CATALOG__TESTS__URI", "sqlite:////nowhere/catalog.db")
    monkeypatch.setattr(pyiceberg_catalogs, "_ENV_CONFIG", Config())
    with raises(StorageError, "catalog=tests PYICEBERG_CATALOG__TESTS__URI"):
        shards_of(table.source)


def test_a_delta_table_that_maps_its_columns_is_refused(tmp_path, monkeypatch):
    table = DeltaTable(tmp_path, monkeypatch)
    table.append(ROWS[:5])
    (log,) = (table.folder / "_delta_log").glob("*.json")
    log.write_text(log.read_text().replace('"delta.enable', '"delta.columnMapping.mode":"name","delta.enable'))
    with raises(DataError, "table columns names"):
        shards_of(table.source)


def test_tables_in_a_bucket(s3, tmp_path, monkeypatch):
    for kind in KINDS.values():
        table = kind(tmp_path / kind.extra, monkeypatch, s3.new_url())
        first = table.append(ROWS[:300])
        table.append(ROWS[300:])
        assert texts(at(table, first)) == sorted(row["text"] for row in ROWS[:300])
        assert len(assert_shards_do_not_matter(table.source, [500], most=6)) == 600
