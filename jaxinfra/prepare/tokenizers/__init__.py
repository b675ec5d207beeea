"""Tokenizers of a recipe: read from a file, converted from another library's file, or trained.

convert_tokenizer(TokenizerFile(path="llama3.json"))      any tokenizer.json
convert_tokenizer(Tiktoken(path="cl100k_base.tiktoken"))  rank files of tiktoken, converted
convert_tokenizer(SentencePieceModel(path="spm.model"))   SentencePiece, converted
convert_tokenizer(Bytes())                                the 256 bytes
train_bpe(texts, vocab_size=8192, ...)                    a new byte-level BPE
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import override

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxinfra.config import Problem
from jaxinfra.config.limits import NonEmptyStr
from jaxinfra.data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer
from jaxinfra.data.tokenizer.tokenizer_json import read_backend
from jaxinfra.prepare.tokenizers.common import HARD_TEXTS, TokenizerConfig
from jaxinfra.prepare.tokenizers.sentence_piece import SentencePieceModel, convert_sentence_piece
from jaxinfra.prepare.tokenizers.tiktoken_ranks import Tiktoken, convert_tiktoken
from jaxinfra.storage.files import read_file


@dataclass(frozen=True, kw_only=True)
class TokenizerFile(TokenizerConfig):
    """A tokenizer.json.

    Attributes:
        path: path or URL of the file.
        special_tokens: special tokens that are added after the last id if the file lacks them.
    """

    path: NonEmptyStr = ""
    special_tokens: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Bytes(TokenizerConfig):
    """UTF-8 bytes as tokens; id 256 ends documents.

    Attributes:
        special_tokens: special tokens, whose ids follow 256.
    """

    special_tokens: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TrainBpe(TokenizerConfig):
    """A byte-level BPE that is trained on the text of the recipe; id 0 ends documents.

    Attributes:
        vocab_size: number of tokens; a short text gives fewer.
        special_tokens: special tokens, whose ids follow 0.
    """

    vocab_size: int = 8192
    special_tokens: tuple[str, ...] = ()

    @override
    def problems(self) -> Iterable[Problem]:
        yield from super().problems()
        least = 257 + len(self.special_tokens)
        if self.vocab_size < least:
            message = "a byte-level vocabulary has 256 bytes, the end of a document and the special tokens"
            yield Problem(fields=("vocab_size",), message=message, fix=f"use vocab_size={least} or more")


PretrainedTokenizer = TokenizerFile | Tiktoken | SentencePieceModel | Bytes
AnyTokenizer = TrainBpe | PretrainedTokenizer


def convert_tokenizer(config: PretrainedTokenizer) -> tuple[Tokenizer, Callable[[Iterable[str]], None]]:
    """Reads or converts a tokenizer, and compares a converted one with its original library on `HARD_TEXTS`.

    Also returns a function that compares them on more texts, which does nothing if there was no conversion. ConfigError
    if the file cannot be used, if the converted tokenizer gives other tokens, or if the library is not installed.
    """
    match config:
        case TokenizerFile():
            backend = read_backend(read_file(config.path, "a tokenizer"), config.path)
            tokenizer = JsonTokenizer.from_backend(backend, config.end_of_document, config.path, config.special_tokens)
            return tokenizer, lambda texts: None
        case Bytes():
            return ByteTokenizer(config.end_of_document, config.special_tokens), lambda texts: None
        case Tiktoken():
            converted = convert_tiktoken(config)
        case SentencePieceModel():
            converted = convert_sentence_piece(config)
    converted.check(HARD_TEXTS)
    return converted.tokenizer, converted.check


def train_bpe(
    texts: Iterable[str], *, vocab_size: int, end_of_document: str, special_tokens: Sequence[str] = ()
) -> JsonTokenizer:
    """Trains a byte-level BPE (Sennrich et al. 2016, on bytes as in GPT-2), whose id 0 ends documents.

    Deterministic in the texts and their order.
    """
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[end_of_document, *special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return JsonTokenizer.from_backend(backend, end_of_document, "the trained tokenizer")
