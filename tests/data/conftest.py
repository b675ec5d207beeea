import random
from pathlib import Path

import pytest

from jaxinfra.data.corpus import Corpus
from jaxinfra.data.prepare import prepare

WORDS = [
    "def",
    "return",
    "self",
    "import",
    "class",
    "for",
    "in",
    "if",
    "naïve",
    "漢字",
    "0",
    "x",
    "(",
    ")",
    ":",
    "=",
]


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
def corpus(text_root):
    return Corpus(root=str(text_root), heldout_fraction=0.2, vocab_size=300)


@pytest.fixture(scope="session")
def store_path(corpus, tmp_path_factory):
    """A store that tests only read."""
    path = tmp_path_factory.mktemp("stores") / "store"
    prepare(corpus, path)
    return path
