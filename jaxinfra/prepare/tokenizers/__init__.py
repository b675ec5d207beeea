"""The tokenizers that a recipe may name, each of which becomes one that a store keeps.

load(TokenizerFile(path="llama3.json"))      any tokenizer.json
load(Tiktoken(path="cl100k_base.tiktoken"))  rank files of tiktoken, converted
load(SentencePieceModel(path="spm.model"))   SentencePiece, converted
load(Bytes())                                the 256 bytes
train_bpe(texts, vocab_size=8192, ...)       a new byte-level BPE
"""

from jaxinfra.prepare.tokenizers.load import AnyTokenizer, Bytes, TokenizerFile, TrainBpe, convert, load, train_bpe
from jaxinfra.prepare.tokenizers.sentence_piece import SentencePieceModel
from jaxinfra.prepare.tokenizers.tiktoken_ranks import Tiktoken

__all__ = [
    "AnyTokenizer",
    "Bytes",
    "SentencePieceModel",
    "Tiktoken",
    "TokenizerFile",
    "TrainBpe",
    "convert",
    "load",
    "train_bpe",
]
