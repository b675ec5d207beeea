"""Text files as Qwen3 reads them."""

from jaxinfra.data.corpus import Corpus
from jaxinfra.data.records.text_files import TextFiles
from jaxinfra.data.tokenizer import TokenizerFile


def config() -> Corpus:
    return Corpus(
        store="stores/text-qwen3",
        source=TextFiles(root="corpora/text", pattern="**/*.txt"),
        tokenizer=TokenizerFile(path="tokenizers/qwen3.json"),
    )
