"""Follows JSON objects with a text, one a line, on standard input."""

from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.sources.stdin import Stdin
from jaxinfra.prepare.tokenizers import Bytes


def config() -> Corpus:
    return Corpus(store="stores/stream", source=Stdin(), tokenizer=Bytes())
