"""Sources read the same records from S3 and Google Cloud Storage as from a folder, with real clients."""

import json

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxinfra.errors import ConfigError, StorageError
from jaxinfra.prepare.sources.tables import Parquet
from jaxinfra.prepare.sources.text import Jsonl, zstd
from jaxinfra.storage.files import list_files
from tests.prepare.sources.reading import assert_shards_do_not_matter, found, read_all
from tests.refusals import raises

ROWS = [{"text": f"row {number} é" * 20, "n": number} for number in range(500)]


@pytest.fixture
def fresh_clients():
    """Clears the clients that fsspec caches, which are connected to the server of another test, also of one before."""

    def clear():
        for kind in ("s3", "gs"):
            fsspec.get_filesystem_class(kind).clear_instance_cache()

    clear()
    yield
    clear()


@pytest.fixture
def root(server, tmp_path, fresh_clients):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    files = {"a.jsonl": lines, "deep/er/b.jsonl.zst": zstd.compress(lines), "ä b [1].jsonl": lines.splitlines()[0]}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "c.parquet", row_group_size=100)
    url = server.new_url()
    for path in tmp_path.rglob("*"):
        if path.is_file():
            server.put(f"{url}/{path.relative_to(tmp_path).as_posix()}", path.read_bytes())
    return url


def test_records_of_a_bucket_equal_those_of_a_folder(server, root, tmp_path):
    for kind in (Jsonl, Parquet):
        stored = assert_shards_do_not_matter(kind(root=root), [1000], most=3)
        assert [(each.key, each.fields) for each in stored] == [
            (each.key, each.fields) for each in found(kind(root=str(tmp_path)))
        ]
    assert [file.name for file in list_files(root, "*")] == [file.name for file in list_files(str(tmp_path), "*")]
    assert [file.name for file in list_files(root, "*/*/*")] == ["deep/er/b.jsonl.zst"]


def test_a_replaced_object_has_another_stamp(server, root):
    before = list_files(root, "a.jsonl")
    assert before == list_files(root, "a.jsonl")
    server.put(f"{root}/a.jsonl", b"x" * before[0].size_bytes)
    assert before[0].stamp != list_files(root, "a.jsonl")[0].stamp
    server.put(f"{root}/new.jsonl", b"x")
    assert len(list_files(root, "new.*")) == 1  # what was listed before is not remembered


def test_failed_requests_are_retried(server, root):
    server.faults.unavailable = 0.2
    assert [each.fields for each in found(Jsonl(root=root, pattern="a.jsonl"), 5000)] == ROWS
    assert server.faults.fired > 0


def test_missing_buckets_and_objects_have_different_errors(server, root):
    for missing in (f"{root}/nowhere", f"{server.scheme}://no-such-bucket-of-tests/x"):
        with raises(ConfigError, "="):
            list_files(missing, "*")
    with raises(StorageError, "gone.jsonl: No such file"):
        source = Jsonl(root=root, pattern="a.jsonl")
        (shard,) = source.list_shards(1 << 30)
        list(source.read(type(shard)(name="gone.jsonl", size_bytes=1, stamp="")))


def test_wrong_credentials_are_one_line(s3, fresh_clients, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-" + s3.secret)
    url = s3.new_url()
    with raises(StorageError, f"{url}: Permission denied") as error:
        read_all(Jsonl(root=url))
    assert s3.secret not in str(error.value)


@pytest.mark.slow
def test_a_server_that_stays_down_is_one_line(s3, fresh_clients):
    s3.faults.down = True
    url = s3.new_url()
    with raises(StorageError, f"{url}: ") as error:
        read_all(Jsonl(root=url))
    assert s3.faults.fired > 1
    assert s3.secret not in str(error.value)
