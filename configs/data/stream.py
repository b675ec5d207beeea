"""JSON objects with a text, one a line, as they come through a pipe."""

from jaxinfra.data.tokenizer import Bytes
from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.sources.stdin import Stdin


def config() -> Corpus:
    return Corpus(store="stores/stream", source=Stdin(), tokenizer=Bytes())
