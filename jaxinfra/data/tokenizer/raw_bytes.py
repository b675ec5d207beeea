"""The vocabulary of the 256 bytes and one token more, which ends documents: nothing is learned, nothing is unknown."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from jaxinfra.config import Problem
from jaxinfra.data.tokenizer.base import Tokenizer, common_problems
from jaxinfra.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """The bytes of UTF-8 are the tokens.

    Attributes:
        end_of_document: how templates spell the token that ends documents; its id is 256.
        special_tokens: more of them, such as those of a template; their ids follow.
    """

    end_of_document: str = "<|endoftext|>"
    special_tokens: tuple[str, ...] = ()

    def problems(self) -> Iterable[Problem]:
        """Yields what is wrong with the description."""
        yield from common_problems(end_of_document=self.end_of_document, special_tokens=self.special_tokens)


class ByteTokenizer(Tokenizer):
    """Bytes as tokens; id 256 ends documents."""

    kind = "bytes"
    file_name = "bytes.json"
    eot_id = 256

    def __init__(self, end_of_document: str, special_tokens: Sequence[str] = ()):
        self.end_of_document = end_of_document
        self.special = {text: 256 + number for number, text in enumerate((end_of_document, *special_tokens))}
        self.vocab_size = 256 + len(self.special)
        self.content = json.dumps({"vocabulary": "bytes", "special_tokens": list(special_tokens)}).encode()

    @classmethod
    def restore(cls, content: bytes, end_of_document: str, name: str) -> Self:
        """See `Tokenizer`."""
        try:
            made = cls(end_of_document, json.loads(content)["special_tokens"])
        except (ValueError, KeyError, TypeError):
            made = None
        if made is None or made.content != content:
            raise ConfigError(f"{name}: is not the description of the vocabulary of bytes; copy it anew")
        return made

    def encode_batch(self, texts: Sequence[str], *, inner: bool = False) -> list[list[int]]:
        """See `Tokenizer`."""
        return [list(text.encode()) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer`."""
        return bytes(index for index in ids if index < 256).decode(errors="replace")

    def byte_lengths(self) -> np.ndarray:
        """See `Tokenizer`."""
        return (np.arange(self.vocab_size) < 256).astype(np.int32)
