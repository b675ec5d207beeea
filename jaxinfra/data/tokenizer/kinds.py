"""From a description of a tokenizer, or from what a store keeps of one, to the tokenizer."""

from jaxinfra.data.tokenizer.base import Tokenizer
from jaxinfra.data.tokenizer.raw_bytes import Bytes, ByteTokenizer
from jaxinfra.data.tokenizer.sentence_pieces import SentencePieceModel, SentencePieceTokenizer, load_sentence_pieces
from jaxinfra.data.tokenizer.tiktoken_ranks import Tiktoken, TiktokenTokenizer, load_tiktoken
from jaxinfra.data.tokenizer.tokenizer_json import JsonTokenizer, TokenizerFile, TrainBpe, load_json
from jaxinfra.errors import ConfigError

AnyTokenizer = TrainBpe | TokenizerFile | Tiktoken | SentencePieceModel | Bytes
"""The tokenizer of a recipe: one that is trained on its text, or an existing one."""

_KINDS: dict[str, type[Tokenizer]] = {
    cls.kind: cls for cls in (JsonTokenizer, TiktokenTokenizer, SentencePieceTokenizer, ByteTokenizer)
}


def load(config: TokenizerFile | Tiktoken | SentencePieceModel | Bytes) -> Tokenizer:
    """Reads an existing tokenizer.

    Raises:
        ConfigError: its file cannot be read, is damaged or of another kind, lacks the end of a document, or the
            library that reads it is not installed.
    """
    match config:
        case TokenizerFile():
            return load_json(config)
        case Tiktoken():
            return load_tiktoken(config)
        case SentencePieceModel():
            return load_sentence_pieces(config)
        case Bytes():
            return ByteTokenizer(config.end_of_document, config.special_tokens)


def restore(kind: str, content: bytes, end_of_document: str, name: str) -> Tokenizer:
    """Makes the tokenizer that had this `kind`, `content` and `end_of_document`; `name` is for errors.

    Raises:
        ConfigError: there is no such kind, or the content is damaged.
    """
    if kind not in _KINDS:
        raise ConfigError(f"{name}: is a tokenizer of kind {kind}, known are {', '.join(_KINDS)}; use a newer jaxinfra")
    return _KINDS[kind].restore(content, end_of_document, name)
