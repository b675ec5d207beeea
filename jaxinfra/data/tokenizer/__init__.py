"""Tokenizers of stores, and incremental decoding.

There are two kinds: a `tokenizer.json`, and the bytes of UTF-8. `jaxinfra.prepare.tokenizers` trains and converts them.
With either, ordinary text never becomes a special token, even where it is equal to one.
"""

from jaxinfra.data.tokenizer.base import Tokenizer
from jaxinfra.data.tokenizer.raw_bytes import ByteTokenizer
from jaxinfra.data.tokenizer.stream import StopStrings, StreamDecoder
from jaxinfra.data.tokenizer.tokenizer_json import JsonTokenizer
from jaxinfra.errors import ConfigError

__all__ = ["ByteTokenizer", "JsonTokenizer", "StopStrings", "StreamDecoder", "Tokenizer", "load_tokenizer"]

_KINDS: dict[str, type[Tokenizer]] = {cls.kind: cls for cls in (JsonTokenizer, ByteTokenizer)}


def load_tokenizer(kind: str, content: bytes, end_of_document: str, name: str) -> Tokenizer:
    """Loads a tokenizer from its content; ConfigError with `name` if the kind is unknown or the content is damaged."""
    if kind not in _KINDS:
        kinds = " or ".join(_KINDS)
        raise ConfigError(f"{name}: kind {kind}, expected {kinds}; update jaxinfra or prepare the store again")
    return _KINDS[kind].from_bytes(content, end_of_document, name)
