"""Prepares the standard library of the running Python with a BPE of 4,096 tokens; needs no network."""

from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.sources.any_source import TextFiles
from jaxinfra.prepare.tokenizers import TrainBpe


def config() -> Corpus:
    return Corpus(
        store="stores/python-stdlib",
        source=TextFiles(root="stdlib", pattern="**/*.py"),
        tokenizer=TrainBpe(vocab_size=4096),
        on_bad="skip",
        baselines=True,
    )
