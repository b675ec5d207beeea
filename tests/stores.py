"""Fixtures of small stores, and of a small vocabulary of every kind."""

import random
from pathlib import Path

import pytest

from jaxinfra.prepare.prepare import prepare
from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.recipes.validation import ByKey
from jaxinfra.prepare.sources.text_files import TextFiles
from jaxinfra.prepare.tokenizers import TrainBpe
from tests.vocabularies import KINDS, vocabulary

WORDS = ["def", "return", "self", "import", "class", "for", "in", "if", "naïve", "漢字", "0", "x", "(", ")", ":", "="]


def write_files(root: Path, count: int = 40, words: int = 300) -> None:
    """Files of random words, the same on every call."""
    rng = random.Random(0)
    for number in range(count):
        path = root / f"part{number % 3}" / f"file{number}.py"
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
