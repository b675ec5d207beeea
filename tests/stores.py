"""Small sources, recipes and stores, what is in them, and a small vocabulary of every kind."""

import json
import random
from pathlib import Path

import pytest

from jaxinfra.data.store.layout import OFFSETS
from jaxinfra.data.store.store import TokenStore
from jaxinfra.prepare.prepare import prepare
from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.recipes.validation import ByKey
from jaxinfra.prepare.sources.text import Jsonl, TextFiles
from jaxinfra.prepare.tokenizers import Bytes, TrainBpe
from tests.vocabularies import KINDS, vocabulary

WORDS = ["def", "return", "self", "import", "class", "for", "in", "if", "naïve", "漢字", "0", "x", "(", ")", ":", "="]


RECIPE = """
from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.recipes.validation import ByKey
from jaxinfra.prepare.sources.text import Jsonl
from jaxinfra.prepare.sources.kafka import Kafka
from jaxinfra.prepare.sources.stdin import Stdin
from jaxinfra.prepare.tokenizers import Bytes
def config():
    return Corpus(store={store!r}, source={source}, tokenizer=Bytes(), shard_bytes=1024,
                  validation=ByKey(fraction=0.1), {more})
"""


def recipe_file(folder, store, source, more=""):
    """The file of a recipe; its source and more fields are given as code."""
    (folder / "recipe.py").write_text(RECIPE.format(store=str(store), source=source, more=more))
    return str(folder / "recipe.py")


def jsonl(folder, records):
    """A source of records in one file; a text is a record of one field."""
    folder.mkdir(exist_ok=True)
    rows = [{"text": each} if isinstance(each, str) else each for each in records]
    (folder / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Jsonl(root=str(folder))


def bytes_recipe(folder, store, **fields):
    """A recipe of JSONL that needs no training and is cut into many jobs."""
    fields = {"tokenizer": Bytes(), "validation": ByKey(fraction=0.1)} | fields
    return Corpus(store=str(store), source=Jsonl(root=str(folder)), **fields)


def ids_of(store, *splits):
    """The token ids of every document, its end left out."""
    found = []
    for split in splits or ("train", "validation"):
        offsets = store.read_all(split, OFFSETS)
        for start, end in zip(offsets[:-1], offsets[1:], strict=True):
            *ids, last = store.read(split, [start], end - start)[0].tolist()
            assert last == store.tokenizer.eot_id
            found.append(ids)
    return found


def documents(store, *splits):
    """Every document as text."""
    store = store if isinstance(store, TokenStore) else TokenStore.open(store)
    return [store.tokenizer.decode(ids) for ids in ids_of(store, *splits)]


def contents(folder):
    """Every file of a version but for what tells when it was made, and from which words."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return found, what_it_holds(found.pop("manifest.json"))


def what_it_holds(manifest: bytes) -> dict[str, object]:
    """A manifest but for what tells when it was made, and from which words."""
    left_out = ("created", "digest", "recipe", "prepared_from")
    return {name: value for name, value in json.loads(manifest).items() if name not in left_out}


def write_files(root: Path, count: int = 40, words: int = 300) -> None:
    """Files of random words, the same on every call."""
    rng = random.Random(0)
    for number in range(count):
        path = root / f"part{number % 3}" / f"file{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(" ".join(rng.choices(WORDS, k=words)) + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def text_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("text")
    write_files(root)
    return root


@pytest.fixture(scope="session")
def corpus(text_root, tmp_path_factory):
    """A recipe; tests only read the store that it makes."""
    return Corpus(
        store=str(tmp_path_factory.mktemp("stores") / "store"),
        source=TextFiles(root=str(text_root)),
        tokenizer=TrainBpe(vocab_size=300),
        validation=ByKey(fraction=0.2),
        baselines=True,
    )


@pytest.fixture(scope="session")
def store_path(corpus):
    """A version that tests only read."""
    return Path(prepare(corpus, workers=1).path)


@pytest.fixture(scope="session")
def vocabularies(tmp_path_factory):
    """A small vocabulary of every kind."""
    folder = tmp_path_factory.mktemp("vocabularies")
    return {kind: vocabulary(kind, folder) for kind in KINDS}


@pytest.fixture(params=KINDS)
def tokenizer(request, vocabularies):
    """Each of them."""
    return vocabularies[request.param]
