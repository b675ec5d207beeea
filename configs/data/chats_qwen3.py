"""Tokenizes conversations for Qwen3, in its chat template: JSON lines with `messages`."""

from jaxinfra.data.packing import PackSpec
from jaxinfra.prepare.documents.formats import Chat
from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.sources.any_source import Jsonl
from jaxinfra.prepare.tokenizers import TokenizerFile


def config() -> Corpus:
    return Corpus(
        store="stores/chats-qwen3",
        source=Jsonl(root="chats"),
        format=Chat(template="chatml"),
        tokenizer=TokenizerFile(path="tokenizers/qwen3.json"),
        packs=(PackSpec(seq_len=4096),),
        on_bad="skip",
    )
