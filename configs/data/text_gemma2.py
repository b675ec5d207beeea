"""Tokenizes text files for Gemma 2."""

from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.sources.any_source import TextFiles
from jaxinfra.prepare.tokenizers import TokenizerFile


def config() -> Corpus:
    return Corpus(
        store="stores/text-gemma2",
        source=TextFiles(root="corpora/text", pattern="**/*.txt"),
        tokenizer=TokenizerFile(path="tokenizers/gemma2.json", end_of_document="<eos>"),
    )
