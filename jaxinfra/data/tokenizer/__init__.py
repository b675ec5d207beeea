"""Token ids and text: the tokenizer that a store keeps, and decoding of ids that come one at a time.

There are two kinds: a `tokenizer.json`, and the bytes of UTF-8. `jaxinfra.prepare.tokenizers` makes them, of what a
recipe names. Ordinary text never spells a special token, whatever the kind.
"""

from jaxinfra.data.tokenizer.base import Tokenizer
from jaxinfra.data.tokenizer.raw_bytes import ByteTokenizer
from jaxinfra.data.tokenizer.stream import StreamDecoder
from jaxinfra.data.tokenizer.tokenizer_json import JsonTokenizer
from jaxinfra.errors import ConfigError

__all__ = ["ByteTokenizer", "JsonTokenizer", "StreamDecoder", "Tokenizer", "load_tokenizer"]

_KINDS: dict[str, type[Tokenizer]] = {cls.kind: cls for cls in (JsonTokenizer, ByteTokenizer)}
_CONVERTED = ("tiktoken", "sentencepiece")  # kinds that stores had once


def load_tokenizer(kind: str, content: bytes, end_of_document: str, name: str) -> Tokenizer:
    """Makes the tokenizer that had this kind, content and end; an unknown kind or damage is a ConfigError on `name`."""
    if kind in _CONVERTED:
        raise ConfigError(f"{name}: {kind} vocabularies are kept as tokenizer.json now; prepare the store again")
    if kind not in _KINDS:
        raise ConfigError(f"{name}: is a tokenizer of kind {kind}, known are {', '.join(_KINDS)}; use a newer jaxinfra")
    return _KINDS[kind].from_bytes(content, end_of_document, name)
