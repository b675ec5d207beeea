"""Parquet, Hugging Face datasets and ArrayRecord, each written by its own library."""

import datetime
import json
import random

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from jaxinfra.config import validate
from jaxinfra.errors import ConfigError, DataError
from jaxinfra.prepare.sources.array_records import ArrayRecords
from jaxinfra.prepare.sources.hugging_face import HuggingFace
from jaxinfra.prepare.sources.parquet import Parquet
from tests.prepare.sources.reading import assert_cuts_do_not_matter, bad, found, pieces_of, read_all

ROWS = [
    {"text": f"row {number} é", "n": number, "words": [str(number)] * (number % 3), "deep": {"a": None}}
    for number in range(1000)
]


def damaged(content: bytes, how: str) -> bytes:
    if how == "cut":
        return content[:-20]
    if how == "empty":
        return b""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :]


# Parquet


@pytest.fixture(scope="module")
def parquet_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("parquet")
    pq.write_table(pa.Table.from_pylist(ROWS[:700]), root / "a.parquet", row_group_size=150, write_page_checksum=True)
    (root / "part").mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS[700:]), root / "part" / "b.parquet", compression="zstd")
    return root


def test_rows_of_parquet_are_read_once_wherever_files_are_cut(parquet_root):
    records = assert_cuts_do_not_matter(Parquet(root=str(parquet_root)), [1, 3000, 10_000], most=6)
    assert [each.record for each in records] == ROWS
    assert (records[-1].key, records[-1].where) == ("part/b.parquet#299", "part/b.parquet row 299")


def test_columns_of_parquet_are_chosen(parquet_root):
    records = found(Parquet(root=str(parquet_root), columns=("n", "text")))
    assert [each.record for each in records] == [{"n": row["n"], "text": row["text"]} for row in ROWS]
    with pytest.raises(ConfigError, match="columns=.*a.parquet has no title; it has text, n, words, deep"):
        read_all(Parquet(root=str(parquet_root), columns=("n", "title")))


@pytest.mark.parametrize("how", ["cut", "empty", "flip"])
def test_a_damaged_parquet_file_is_named(parquet_root, tmp_path, how):
    (tmp_path / "a.parquet").write_bytes(damaged((parquet_root / "a.parquet").read_bytes(), how))
    with pytest.raises(DataError, match=r"/a\.parquet: is damaged"):
        read_all(Parquet(root=str(tmp_path)))


def test_rows_that_python_cannot_hold_are_bad_and_the_others_are_read(tmp_path):
    when = pa.array([0, 2**50, 1], pa.timestamp("s"))
    text = pa.array([b"fine", b"fine", b"caf\xe9"]).view(pa.string())
    pq.write_table(pa.table({"when": when, "text": text}), tmp_path / "a.parquet")
    source = Parquet(root=str(tmp_path))
    assert [line.partition(":")[0] for line in bad(source)] == ["a.parquet row 1", "a.parquet row 2"]
    assert read_all(source)[0].record == {"when": datetime.datetime(1970, 1, 1), "text": "fine"}


def test_parquet_of_a_store_is_what_it_is_in_a_folder(parquet_root):
    fs = fsspec.filesystem("memory")
    fs.put(str(parquet_root), "/parquet", recursive=True)
    records = assert_cuts_do_not_matter(Parquet(root="memory://parquet"), [3000], most=4)
    assert [each.record for each in records] == ROWS
    fs.rm("/parquet", recursive=True)


# Hugging Face


@pytest.fixture(scope="module")
def dataset_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("huggingface")
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(path / "one", num_shards=2)
    chosen = dataset.shuffle(seed=0).select(range(10))
    datasets.DatasetDict({"train": dataset, "test": chosen}).save_to_disk(path / "dict")
    return path


def test_rows_of_a_dataset_are_read_once_wherever_files_are_cut(dataset_path):
    records = assert_cuts_do_not_matter(HuggingFace(path=str(dataset_path / "one")), [1000, 10_000], most=20)
    assert [each.record for each in records] == ROWS
    assert records[-1].key == "data-00001-of-00002.arrow#499"


def test_a_split_of_a_dataset_is_chosen(dataset_path):
    path = str(dataset_path / "dict")
    assert [each.record for each in found(HuggingFace(path=path, split="train"))] == ROWS
    expected = datasets.load_from_disk(path)["test"].to_list()
    assert [each.record for each in found(HuggingFace(path=path, split="test"))] == expected
    with pytest.raises(ConfigError, match="split=none: .*/dict has train, test; use split=train"):
        pieces_of(HuggingFace(path=path))
    with pytest.raises(ConfigError, match="split=trian: .*/dict has train, test; use split=train"):
        pieces_of(HuggingFace(path=path, split="trian"))
    with pytest.raises(ConfigError, match="split=train: .*/one has no splits"):
        pieces_of(HuggingFace(path=str(dataset_path / "one"), split="train"))
    with pytest.raises(ConfigError, match=r"matches no file|has no state\.json"):
        pieces_of(HuggingFace(path=str(dataset_path)))


def test_a_dataset_of_a_store_is_what_it_is_in_a_folder(dataset_path):
    datasets.load_from_disk(str(dataset_path / "one")).save_to_disk("memory://one")
    records = assert_cuts_do_not_matter(HuggingFace(path="memory://one"), [1000])
    assert [each.record for each in records] == ROWS
    fsspec.filesystem("memory").rm("/one", recursive=True)


@pytest.mark.parametrize("how", ["cut", "empty"])
def test_a_damaged_file_of_a_dataset_is_named(dataset_path, tmp_path, how):
    for file in (dataset_path / "one").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    last = tmp_path / "data-00001-of-00002.arrow"
    last.write_bytes(damaged(last.read_bytes(), how))
    with pytest.raises(DataError, match=r"/data-00001-of-00002\.arrow: is cut short"):
        read_all(HuggingFace(path=str(tmp_path)))
    last.unlink()
    with pytest.raises(DataError, match=r"/data-00001-of-00002\.arrow: is missing"):
        read_all(HuggingFace(path=str(tmp_path)))


# ArrayRecord


def write_array_record(path, payloads):
    writer = ArrayRecordWriter(str(path), "group_size:16")
    for payload in payloads:
        writer.write(payload)
    writer.close()


@pytest.fixture(scope="module")
def array_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("array_record")
    payloads = [json.dumps(row).encode() for row in ROWS]
    write_array_record(root / "x.array_record-00000-of-00002", payloads[:600])
    write_array_record(root / "x.array_record-00001-of-00002", payloads[600:])
    return root


def test_array_records_are_read_once_wherever_files_are_cut(array_root):
    records = assert_cuts_do_not_matter(ArrayRecords(root=str(array_root)), [1000, 20_000], most=60)
    assert [each.record for each in records] == ROWS
    assert records[-1].key == "x.array_record-00001-of-00002#399"


def test_array_records_are_decoded_as_told(array_root, tmp_path):
    texts = [each.record["text"] for each in found(ArrayRecords(root=str(array_root), decode="text"))]
    assert [json.loads(text) for text in texts] == ROWS
    (first, *_) = found(ArrayRecords(root=str(array_root), decode="bytes"))
    assert first.record == {"bytes": texts[0].encode()}
    write_array_record(tmp_path / "a.array_record", [b"{}", b"[]", b"\xff"])
    assert bad(ArrayRecords(root=str(tmp_path))) == [
        "a.array_record record 1: is an array, expected an object",
        "a.array_record record 2: not UTF-8 at byte 0",
    ]
    assert bad(ArrayRecords(root=str(tmp_path), decode="text")) == ["a.array_record record 2: not UTF-8 at byte 0"]


@pytest.mark.parametrize("how", ["cut", "empty", "flip"])
def test_a_damaged_array_record_is_named_and_never_read_as_a_shorter_one(tmp_path, how):
    rng = random.Random(0)
    write_array_record(tmp_path / "a.array_record", [rng.randbytes(200) for _ in range(1000)])
    content = (tmp_path / "a.array_record").read_bytes()
    (tmp_path / "a.array_record").write_bytes(damaged(content, how))
    with pytest.raises(DataError, match=r"/a\.array_record: is damaged"):
        read_all(ArrayRecords(root=str(tmp_path), decode="bytes"))


def test_array_records_in_a_store_are_refused():
    with pytest.raises(ConfigError, match="^root=s3://bucket/x: ArrayRecord files are read from a local disk only"):
        validate(ArrayRecords(root="s3://bucket/x"))


def test_files_without_records_have_none(tmp_path):
    write_array_record(tmp_path / "a.array_record", [])
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    empty = datasets.Dataset.from_dict({"text": []}, features=datasets.Features({"text": datasets.Value("string")}))
    empty.save_to_disk(tmp_path / "hf")
    for source in (
        ArrayRecords(root=str(tmp_path)),
        Parquet(root=str(tmp_path)),
        HuggingFace(path=str(tmp_path / "hf")),
    ):
        assert found(source, 1) == []
