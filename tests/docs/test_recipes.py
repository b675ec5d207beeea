"""The recipes that docs/data.md and docs/text.md show are right and make stores."""

import re
import textwrap
from dataclasses import fields, replace
from pathlib import Path

import datasets
import pytest

from jaxinfra.config import load, validate
from jaxinfra.data.store.store import TokenStore
from jaxinfra.prepare import tokenizers
from jaxinfra.prepare.documents import dedup, filters, formats
from jaxinfra.prepare.prepare import prepare
from jaxinfra.prepare.recipes import corpus
from jaxinfra.prepare.sources import any_source

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
FILES = {
    re.search(r"configs/data/(\w+)\.py", content)[1]: content
    for content in re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
}
TEXTS = {"train": [f"training text {number} " * 30 for number in range(40)], "validation": ["validation text"] * 3}


def two_folders(root):
    for split, texts in TEXTS.items():
        (root / split).mkdir(parents=True)
        for number, text in enumerate(texts):
            (root / split / f"{number}.txt").write_text(text)
    return 40, 3


def book(root):
    (root / "book").mkdir(parents=True)
    (root / "book" / "book.txt").write_text("".join(TEXTS["train"]))
    return 1, 1


def saved(root):
    splits = {split: datasets.Dataset.from_dict({"text": texts}) for split, texts in TEXTS.items()}
    datasets.DatasetDict(splits).save_to_disk(str(root / "saved"))
    return 40, 3


MAKERS = {maker.__name__: maker for maker in (two_folders, book, saved)}


def test_every_recipe_has_a_corpus():
    assert FILES.keys() == MAKERS.keys()


@pytest.mark.parametrize("name", FILES)
def test_recipes_make_the_splits_that_they_name(name, tmp_path, monkeypatch):
    (tmp_path / f"{name}.py").write_text(FILES[name])
    monkeypatch.chdir(tmp_path)
    train, validation = MAKERS[name](tmp_path / "corpora")
    recipe = load(tmp_path / f"{name}.py", ["tokenizer.vocab_size=300"]).run
    validate(recipe)
    splits = TokenStore.open(prepare(replace(recipe, baselines=True), workers=1).path).manifest.splits
    assert (splits["train"].documents, splits["validation"].documents) == (train, validation)


TEXT_PAGE = (Path(__file__).parents[2] / "docs" / "text.md").read_text()
MODULES = (any_source, corpus, dedup, filters, formats, tokenizers)
NAMES = {"replace": replace} | {name: value for module in MODULES for name, value in vars(module).items()}


def test_recipes_are_right():
    blocks = re.findall(r"^    Corpus\(\n(?:     .*\n)+    \)$", TEXT_PAGE, re.MULTILINE)
    assert len(blocks) == 1
    validate(eval(textwrap.dedent(blocks[0]), NAMES))
    (file,) = re.findall(r"^```python\n(.*?)^```$", TEXT_PAGE, re.MULTILINE | re.DOTALL)
    names = {}
    exec(file, names)
    validate(names["config"]())


def test_defaults_are_those_of_the_classes():
    shown = re.findall(r"`(\w+)\(((?:\w+(?:=[^,)]+)?(?:, )?)*)\)`", TEXT_PAGE)
    assert {name for name, _ in shown} >= {"Chat", "Completion", "Preference", "Text", "TrainBpe", "Tiktoken"}
    for name, arguments in shown:
        defaults = {field.name: field.default for field in fields(NAMES[name])}
        for argument in filter(None, arguments.split(", ")):
            field, _, value = argument.partition("=")
            assert field in defaults
            if value and name not in ("Filters", "Dedup"):
                assert eval(value) == defaults[field]
