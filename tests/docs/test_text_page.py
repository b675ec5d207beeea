"""The recipes that docs/text.md shows are recipes."""

import re
import textwrap
from dataclasses import fields, replace
from pathlib import Path

from jaxinfra.config import validate
from jaxinfra.prepare.documents.chat import Chat
from jaxinfra.prepare.documents.dedup import Dedup
from jaxinfra.prepare.documents.document import Text
from jaxinfra.prepare.documents.filters import Filters
from jaxinfra.prepare.documents.preference import Completion, Preference
from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.sources.jsonl import Jsonl
from jaxinfra.prepare.tokenizers import Bytes, SentencePieceModel, Tiktoken, TokenizerFile, TrainBpe

PAGE = (Path(__file__).parents[2] / "docs" / "text.md").read_text()
NAMES = {
    each.__name__: each
    for each in (
        Bytes,
        Chat,
        Completion,
        Corpus,
        Dedup,
        Filters,
        Jsonl,
        Preference,
        SentencePieceModel,
        Text,
        Tiktoken,
        TokenizerFile,
        TrainBpe,
        replace,
    )
}


def test_recipes_are_right():
    blocks = re.findall(r"^    Corpus\(\n(?:     .*\n)+    \)$", PAGE, re.MULTILINE)
    assert len(blocks) == 1
    validate(eval(textwrap.dedent(blocks[0]), NAMES))
    (file,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    names = {}
    exec(file, names)
    validate(names["config"]())


def test_defaults_are_those_of_the_classes():
    shown = re.findall(r"`(\w+)\(((?:\w+(?:=[^,)]+)?(?:, )?)*)\)`", PAGE)
    assert {name for name, _ in shown} >= {"Chat", "Completion", "Preference", "Text", "TrainBpe", "Tiktoken"}
    for name, arguments in shown:
        defaults = {field.name: field.default for field in fields(NAMES[name])}
        for argument in filter(None, arguments.split(", ")):
            field, _, value = argument.partition("=")
            assert field in defaults
            if value and name not in ("Filters", "Dedup"):
                assert eval(value) == defaults[field]
