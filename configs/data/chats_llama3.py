"""Tokenizes conversations for Llama 3, in its chat template: JSON lines with `messages`."""

from jaxinfra.data.packing import PackSpec
from jaxinfra.prepare.documents.formats import Chat
from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.sources.any_source import Jsonl
from jaxinfra.prepare.tokenizers import TokenizerFile


def config() -> Corpus:
    return Corpus(
        store="stores/chats-llama3",
        source=Jsonl(root="chats"),
        format=Chat(template="llama3"),
        tokenizer=TokenizerFile(path="tokenizers/llama3.json", end_of_document="<|end_of_text|>"),
        packs=(PackSpec(seq_len=4096),),
        on_bad="skip",
    )
