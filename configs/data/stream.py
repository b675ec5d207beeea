"""JSON objects with a text, one a line, as they come through a pipe."""

from jaxinfra.data.corpus import Corpus
from jaxinfra.data.records.stdin import Stdin
from jaxinfra.data.tokenizer import Bytes


def config() -> Corpus:
    return Corpus(store="stores/stream", source=Stdin(), tokenizer=Bytes())
