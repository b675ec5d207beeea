"""Tokenizers of a recipe: read from a file, converted, or trained. The store keeps the result.

build_tokenizer(TokenizerFile(path="llama3.json"))      any tokenizer.json
build_tokenizer(Tiktoken(path="cl100k_base.tiktoken"))  rank files of tiktoken, converted
build_tokenizer(SentencePieceModel(path="spm.model"))   SentencePiece, converted
build_tokenizer(Bytes())                                the 256 bytes
train_bpe(texts, vocab_size=8192, ...)                 a new byte-level BPE
"""

from jaxinfra.prepare.tokenizers.load import (
    AnyTokenizer,
    Bytes,
    TokenizerFile,
    TrainBpe,
    build_tokenizer,
    convert_tokenizer,
    train_bpe,
)
from jaxinfra.prepare.tokenizers.sentence_piece import SentencePieceModel
from jaxinfra.prepare.tokenizers.tiktoken_ranks import Tiktoken

__all__ = [
    "AnyTokenizer",
    "Bytes",
    "SentencePieceModel",
    "Tiktoken",
    "TokenizerFile",
    "TrainBpe",
    "convert_tokenizer",
    "build_tokenizer",
    "train_bpe",
]
