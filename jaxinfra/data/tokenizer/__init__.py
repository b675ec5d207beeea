"""Text to token ids and back, by vocabularies of four kinds behind one face.

    load(TokenizerFile(path="llama3.json"))      any tokenizer.json
    load(Tiktoken(path="cl100k_base.tiktoken"))  rank files of tiktoken
    load(SentencePieceModel(path="spm.model"))   SentencePiece
    load(Bytes())                                the 256 bytes
    train_bpe(texts, vocab_size=8192, ...)       a new byte-level BPE

Ordinary text never spells a special token, whatever the kind. Nothing here knows of records, files of text or stores.
"""

from jaxinfra.data.tokenizer.base import Tokenizer
from jaxinfra.data.tokenizer.kinds import AnyTokenizer, load, restore
from jaxinfra.data.tokenizer.raw_bytes import Bytes
from jaxinfra.data.tokenizer.sentence_pieces import SentencePieceModel
from jaxinfra.data.tokenizer.stream import StreamDecoder
from jaxinfra.data.tokenizer.tiktoken_ranks import Tiktoken
from jaxinfra.data.tokenizer.tokenizer_json import TokenizerFile, TrainBpe, train_bpe

__all__ = [
    "AnyTokenizer",
    "Bytes",
    "SentencePieceModel",
    "StreamDecoder",
    "Tiktoken",
    "Tokenizer",
    "TokenizerFile",
    "TrainBpe",
    "load",
    "restore",
    "train_bpe",
]
