"""Text files as Qwen3 reads them."""

from jaxinfra.data.tokenizer import TokenizerFile
from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.sources.text_files import TextFiles


def config() -> Corpus:
    return Corpus(
        store="stores/text-qwen3",
        source=TextFiles(root="corpora/text", pattern="**/*.txt"),
        tokenizer=TokenizerFile(path="tokenizers/qwen3.json"),
    )
