"""Tokenizes text files for GPT-2."""

from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.sources.any_source import TextFiles
from jaxinfra.prepare.tokenizers import TokenizerFile


def config() -> Corpus:
    return Corpus(
        store="stores/text-gpt2",
        source=TextFiles(root="corpora/text", pattern="**/*.txt"),
        tokenizer=TokenizerFile(path="tokenizers/gpt2.json"),
    )
