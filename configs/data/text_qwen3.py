"""Tokenizes text files for Qwen3."""

from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.sources.any_source import TextFiles
from jaxinfra.prepare.tokenizers import TokenizerFile


def config() -> Corpus:
    return Corpus(
        store="stores/text-qwen3",
        source=TextFiles(root="corpora/text", pattern="**/*.txt"),
        tokenizer=TokenizerFile(path="tokenizers/qwen3.json"),
    )
