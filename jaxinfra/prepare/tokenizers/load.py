"""From the description of a tokenizer to the tokenizer: read, converted or trained."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import override

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxinfra.config import Problem
from jaxinfra.config.limits import NonEmpty
from jaxinfra.data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer
from jaxinfra.data.tokenizer.tokenizer_json import read_backend
from jaxinfra.prepare.tokenizers.common import TRICKY, Vocabulary
from jaxinfra.prepare.tokenizers.sentence_piece import SentencePieceModel, convert_sentence_piece
from jaxinfra.prepare.tokenizers.tiktoken_ranks import Tiktoken, convert_tiktoken
from jaxinfra.storage.files import read_file


@dataclass(frozen=True, kw_only=True)
class TokenizerFile(Vocabulary):
    """An existing tokenizer.json, of a path or URL.

    `special_tokens` must be special, such as those of a template; what the file lacks follows its last id.
    """

    path: NonEmpty = ""
    special_tokens: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Bytes(Vocabulary):
    """The bytes of UTF-8 are the tokens; the end of a document is 256, and more special tokens follow."""

    special_tokens: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TrainBpe(Vocabulary):
    """A byte-level BPE that is trained on the text of the recipe; a small text gives fewer tokens.

    The id of the end of a document is 0; those of `special_tokens`, such as those of a template, follow.
    """

    vocab_size: int = 8192
    special_tokens: tuple[str, ...] = ()

    @override
    def problems(self) -> Iterable[Problem]:
        yield from super().problems()
        least = 257 + len(self.special_tokens)
        if self.vocab_size < least:
            message = "a byte-level vocabulary needs 256 bytes, the end of a document and its special tokens"
            yield Problem(fields=("vocab_size",), message=message, fix=f"use vocab_size={least} or more")


Existing = TokenizerFile | Tiktoken | SentencePieceModel | Bytes
"""A tokenizer that is not trained on the text of the recipe."""
AnyTokenizer = TrainBpe | Existing
"""The tokenizer of a recipe: one that is trained on its text, or an existing one."""


def load(config: Existing) -> Tokenizer:
    """Reads an existing tokenizer, as `convert` does."""
    return convert(config)[0]


def convert(config: Existing) -> tuple[Tokenizer, Callable[[Iterable[str]], None]]:
    """Reads an existing tokenizer; one of another library is converted, and compared with it on texts that are hard.

    Returns:
        The tokenizer, and what compares it with that library on more texts: a ConfigError says where they differ.

    Raises:
        ConfigError: its file cannot be used, or gives other tokens once it is converted; or the library is missing.
    """
    match config:
        case TokenizerFile():
            backend = read_backend(read_file(config.path, "a tokenizer"), config.path)
            found = JsonTokenizer.from_backend(backend, config.end_of_document, config.path, config.special_tokens)
            return found, lambda texts: None
        case Bytes():
            return ByteTokenizer(config.end_of_document, config.special_tokens), lambda texts: None
        case Tiktoken():
            converted = convert_tiktoken(config)
        case SentencePieceModel():
            converted = convert_sentence_piece(config)
    converted.check(TRICKY)
    return converted.tokenizer, converted.check


def train_bpe(
    texts: Iterable[str], *, vocab_size: int, end_of_document: str, special_tokens: Sequence[str] = ()
) -> JsonTokenizer:
    """Trains a byte-level BPE (Sennrich et al. 2016, on bytes as in GPT-2); its id 0 ends documents.

    The same texts in the same order give the same tokenizer.
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
