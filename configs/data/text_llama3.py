"""Tokenizes text files for Llama 3."""

from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.sources.any_source import TextFiles
from jaxinfra.prepare.tokenizers import TokenizerFile


def config() -> Corpus:
    return Corpus(
        store="stores/text-llama3",
        source=TextFiles(root="corpora/text", pattern="**/*.txt"),
        tokenizer=TokenizerFile(path="tokenizers/llama3.json", end_of_document="<|end_of_text|>"),
    )
