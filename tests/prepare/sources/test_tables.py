"""Sources of Parquet, Hugging Face datasets and ArrayRecord, written by their own libraries."""

import datetime
import json
import shutil
from dataclasses import replace

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from jaxinfra.errors import ConfigError, DataError
from jaxinfra.prepare.prepare import prepare
from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.recipes.validation import ByKey
from jaxinfra.prepare.sources.tables import ArrayRecords, HuggingFace, Parquet
from jaxinfra.prepare.tokenizers import Bytes
from tests.prepare.sources.reading import assert_shards_do_not_matter, bad, found, read_all, shards_of
from tests.refusals import raises
from tests.stores import documents

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


def write_array_record(path, payloads):
    writer = ArrayRecordWriter(str(path), "group_size:16")
    for payload in payloads:
        writer.write(payload)
    writer.close()


@pytest.fixture(scope="module")
def parquet_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("parquet")
    pq.write_table(pa.Table.from_pylist(ROWS[:700]), root / "a.parquet", row_group_size=150, write_page_checksum=True)
    (root / "part").mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS[700:]), root / "part" / "b.parquet", compression="zstd")
    return root


@pytest.fixture(scope="module")
def dataset_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("huggingface")
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(path / "one", num_shards=2)
    chosen = dataset.shuffle(seed=0).select(range(10))
    datasets.DatasetDict({"train": dataset, "test": chosen}).save_to_disk(path / "dict")
    return path


@pytest.fixture(scope="module")
def array_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("array_record")
    payloads = [json.dumps(row).encode() for row in ROWS]
    write_array_record(root / "x.array_record-00000-of-00002", payloads[:600])
    write_array_record(root / "x.array_record-00001-of-00002", payloads[600:])
    return root


@pytest.fixture(params=["parquet", "dataset", "array"])
def source(request, parquet_root, dataset_path, array_root):
    """A source of each kind with the same rows in two files."""
    return {
        "parquet": Parquet(root=str(parquet_root)),
        "dataset": HuggingFace(path=str(dataset_path / "one")),
        "array": ArrayRecords(root=str(array_root)),
    }[request.param]


LAST = {
    Parquet: "part/b.parquet#299",
    HuggingFace: "data-00001-of-00002.arrow#499",
    ArrayRecords: "x.array_record-00001-of-00002#399",
}


def test_rows_are_read_once_wherever_files_are_split(source, tmp_path):
    records = assert_shards_do_not_matter(source, [1, 1000, 20_000], most=6)
    assert [each.fields for each in records] == ROWS
    assert records[-1].key == LAST[type(source)]
    recipe = Corpus(store=str(tmp_path / "store"), source=source, tokenizer=Bytes(), validation=ByKey(fraction=0.2))
    prepare(recipe, workers=1)
    assert sorted(documents(recipe.store)) == sorted(row["text"] for row in ROWS)


@pytest.mark.parametrize("how", ["cut", "empty", "flip"])
def test_a_damaged_table_is_an_error(source, tmp_path, how):
    place = "path" if isinstance(source, HuggingFace) else "root"
    copy = shutil.copytree(getattr(source, place), tmp_path / "copy")
    name = shards_of(source)[0].name
    (copy / name).write_bytes(damaged((copy / name).read_bytes(), how))
    if how == "flip" and place == "path":  # whose files have no checksums
        (copy / name).unlink()
    with raises(DataError, f"/{name}: "):
        read_all(replace(source, **{place: str(copy)}))


def test_parquet_columns_can_be_selected(parquet_root):
    records = found(Parquet(root=str(parquet_root), columns=("n", "text")))
    assert [each.fields for each in records] == [{"n": row["n"], "text": row["text"]} for row in ROWS]
    with raises(ConfigError, "columns= a.parquet title; text, n, words, deep"):
        read_all(Parquet(root=str(parquet_root), columns=("n", "title")))


def test_rows_that_python_cannot_represent_are_bad(tmp_path):
    when = pa.array([0, 2**50, 1], pa.timestamp("s"))
    text = pa.array([b"fine", b"fine", b"caf\xe9"]).view(pa.string())
    pq.write_table(pa.table({"when": when, "text": text}), tmp_path / "a.parquet")
    source = Parquet(root=str(tmp_path))
    assert [line.partition(":")[0] for line in bad(source)] == ["a.parquet row 1", "a.parquet row 2"]
    assert read_all(source)[0].fields == {"when": datetime.datetime(1970, 1, 1), "text": "fine"}


def test_a_split_of_a_dataset_can_be_selected(dataset_path):
    path = str(dataset_path / "dict")
    assert [each.fields for each in found(HuggingFace(path=path, split="train"))] == ROWS
    expected = datasets.load_from_disk(path)["test"].to_list()
    assert [each.fields for each in found(HuggingFace(path=path, split="test"))] == expected
    for source, named in (
        (HuggingFace(path=path), "split=none: /dict train, test; use split=train"),
        (HuggingFace(path=path, split="trian"), "split=trian: /dict train, test; use split=train"),
        (HuggingFace(path=str(dataset_path / "one"), split="train"), "split=train: /one"),
        (HuggingFace(path=str(dataset_path)), str(dataset_path)),
    ):
        with raises(ConfigError, named):
            shards_of(source)


def test_a_remote_dataset_equals_the_local_one(dataset_path):
    datasets.load_from_disk(str(dataset_path / "one")).save_to_disk("memory://one")
    records = assert_shards_do_not_matter(HuggingFace(path="memory://one"), [1000])
    assert [each.fields for each in records] == ROWS
    fsspec.filesystem("memory").rm("/one", recursive=True)


def test_array_records_are_decoded_as_configured(array_root, tmp_path):
    texts = [each.fields["text"] for each in found(ArrayRecords(root=str(array_root), decode="text"))]
    assert [json.loads(text) for text in texts] == ROWS
    (first, *_) = found(ArrayRecords(root=str(array_root), decode="bytes"))
    assert first.fields == {"bytes": texts[0].encode()}
    write_array_record(tmp_path / "a.array_record", [b"{}", b"[]", b"\xff"])
    assert bad(ArrayRecords(root=str(tmp_path))) == [
        "a.array_record record 1: is an array, expected an object",
        "a.array_record record 2: not UTF-8 at byte 0",
    ]
    assert bad(ArrayRecords(root=str(tmp_path), decode="text")) == ["a.array_record record 2: not UTF-8 at byte 0"]


def test_files_without_records_yield_no_records(tmp_path):
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
