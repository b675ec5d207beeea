"""Tokenizes pairs of answers for Qwen3: JSON lines with `prompt`, `chosen` and `rejected`."""

from jaxinfra.prepare.documents.formats import Preference
from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.sources.any_source import Jsonl
from jaxinfra.prepare.tokenizers import TokenizerFile


def config() -> Corpus:
    return Corpus(
        store="stores/pairs-qwen3",
        source=Jsonl(root="pairs"),
        format=Preference(template="chatml"),
        tokenizer=TokenizerFile(path="tokenizers/qwen3.json"),
        on_bad="skip",
    )
