"""Every kind of source, and every engine, from the recipe to the store: the same documents come out."""

import gzip
import json
import random
from pathlib import Path

import array_record.python.array_record_module as array_record
import datasets
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from jaxinfra.data.store.store import TokenStore
from jaxinfra.prepare.prepare import prepare
from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.recipes.validation import ByKey
from jaxinfra.prepare.sources.array_records import ArrayRecords
from jaxinfra.prepare.sources.hugging_face import HuggingFace
from jaxinfra.prepare.sources.jsonl import Jsonl
from jaxinfra.prepare.sources.parquet import Parquet
from jaxinfra.prepare.sources.python_source import PythonSource
from jaxinfra.prepare.sources.text_files import TextFiles
from jaxinfra.prepare.sources.text_lines import TextLines
from jaxinfra.prepare.tokenizers import Bytes
from tests.prepare.test_prepare import contents, documents
from tests.tiny_run import ended, start

WORDS = ["a", "bb", "naïve", "漢字", "<|endoftext|>"]


def texts():
    """What every source holds; also called as one."""
    rng = random.Random(0)
    for number in range(200):
        yield f"{number} {' '.join(rng.choices(WORDS, k=rng.randrange(1, 20)))}"


def text_files(folder):
    for number, text in enumerate(texts()):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return TextFiles(root=str(folder), pattern="*.txt")


def text_lines(folder):
    (folder / "lines.txt").write_text("\n".join(texts()), encoding="utf-8")
    return TextLines(root=str(folder), pattern="*.txt")


def _jsonl(folder, name, pack):
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts()).encode()
    (folder / name).write_bytes(pack(content))
    return Jsonl(root=str(folder))


def plain(folder):
    return _jsonl(folder, "a.jsonl", bytes)


def gzipped(folder):
    return _jsonl(folder, "a.jsonl.gz", gzip.compress)


def zstandard_packed(folder):
    return _jsonl(folder, "a.jsonl.zst", zstandard.compress)


def parquet(folder):
    table = pyarrow.table({"text": list(texts())})
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=30)
    return Parquet(root=str(folder))


def array_records(folder):
    writer = array_record.ArrayRecordWriter(str(folder / "a.array_record"), "group_size:1")
    for text in texts():
        writer.write(json.dumps({"text": text}).encode())
    writer.close()
    return ArrayRecords(root=str(folder))


def hugging_face(folder):
    datasets.Dataset.from_dict({"text": list(texts())}).save_to_disk(str(folder / "saved"))
    return HuggingFace(path=str(folder / "saved"))


def python(folder):
    return PythonSource(factory="tests.prepare.test_prepare_sources:texts")


SOURCES = (
    text_files,
    text_lines,
    plain,
    gzipped,
    zstandard_packed,
    parquet,
    array_records,
    hugging_face,
    python,
)


@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__)
def test_every_source_gives_its_documents(make, tmp_path):
    (tmp_path / "source").mkdir()
    recipe = Corpus(
        store=str(tmp_path / "store"),
        source=make(tmp_path / "source"),
        tokenizer=Bytes(),
        validation=ByKey(fraction=0.2),
        shard_bytes=1024,
    )
    prepare(recipe, workers=1)
    store = TokenStore.open(tmp_path / "store")
    found = documents(store, "train") + documents(store, "heldout")
    assert sorted(found) == sorted(texts())


ENGINE_RECIPE = """\
from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.recipes.validation import ByKey
from jaxinfra.prepare.sources.jsonl import Jsonl
from jaxinfra.prepare.tokenizers import Bytes


def config() -> Corpus:
    return Corpus(store={store!r}, source=Jsonl(root={source!r}), tokenizer=Bytes(), shard_bytes=1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray", "dask", "spark"])
def test_every_engine_gives_the_same_bytes(engine, tmp_path):
    """As a user starts them: engines start processes, which the one that runs the tests is too busy for."""
    source, recipe = tmp_path / "source", tmp_path / "recipe.py"
    source.mkdir()
    plain(source)
    recipe.write_text(ENGINE_RECIPE.format(source=str(source), store=str(tmp_path / "one")))
    made = {}
    for store, arguments in (("one", ("--workers", "1")), ("other", ("--engine", engine, "--workers", "2"))):
        place = tmp_path / store
        done = ended(start("data", "prepare", str(recipe), f"store={place}", *arguments), timeout_s=300)
        assert done.code == 0, done
        made[store] = contents(Path(TokenStore.open(place).storage.url))
    assert made["other"] == made["one"]
