"""From the description of a tokenizer to the tokenizer."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from jaxinfra.config.limits import NonEmpty
from jaxinfra.data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer
from jaxinfra.data.tokenizer.tokenizer_json import read_backend
from jaxinfra.prepare.tokenizers.common import TRICKY, Vocabulary
from jaxinfra.prepare.tokenizers.sentence_piece import SentencePieceModel, convert_sentence_piece
from jaxinfra.prepare.tokenizers.tiktoken_ranks import Tiktoken, convert_tiktoken
from jaxinfra.prepare.tokenizers.train import TrainBpe
from jaxinfra.storage.files import read_content


@dataclass(frozen=True, kw_only=True)
class TokenizerFile(Vocabulary):
    """An existing tokenizer.json.

    Attributes:
        path: of the file, or its URL.
        special_tokens: those that must be special, such as those of a template. What the file lacks is added to it:
            ids follow its last one.
    """

    path: NonEmpty = ""
    special_tokens: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Bytes(Vocabulary):
    """The bytes of UTF-8 are the tokens; the id of the end of a document, which templates may spell, is 256.

    Attributes:
        special_tokens: more of them, such as those of a template; their ids follow.
    """

    special_tokens: tuple[str, ...] = ()


Existing = TokenizerFile | Tiktoken | SentencePieceModel | Bytes
"""A tokenizer that is not trained on the text of the recipe."""
AnyTokenizer = TrainBpe | Existing
"""The tokenizer of a recipe: one that is trained on its text, or an existing one."""
Check = Callable[[Iterable[str]], None]
"""Compares what a tokenizer makes of texts with what it should."""


def load(config: Existing) -> Tokenizer:
    """Reads an existing tokenizer, as `convert` does."""
    return convert(config)[0]


def convert(config: Existing) -> tuple[Tokenizer, Check]:
    """Reads an existing tokenizer; one of another library is converted, and compared with it on texts that are hard.

    Returns:
        The tokenizer, and what compares it with the library that its file is of on more texts: it raises a ConfigError
        where they differ. Other tokenizers are compared with nothing.

    Raises:
        ConfigError: its file cannot be read, is damaged or of another kind, lacks the end of a document, or gives
            other tokens once it is converted; or the library that it is compared with is not installed.
    """
    match config:
        case TokenizerFile():
            backend = read_backend(read_content(config.path, "a tokenizer"), config.path)
            found = JsonTokenizer.adopt(backend, config.end_of_document, config.path, config.special_tokens)
            return found, lambda texts: None
        case Bytes():
            return ByteTokenizer(config.end_of_document, config.special_tokens), lambda texts: None
        case Tiktoken():
            converted = convert_tiktoken(config)
        case SentencePieceModel():
            converted = convert_sentence_piece(config)
    converted.check(TRICKY)
    return converted.tokenizer, converted.check
