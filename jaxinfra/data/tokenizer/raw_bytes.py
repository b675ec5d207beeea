"""The vocabulary of the 256 bytes and one token more, which ends documents: nothing is learned, nothing is unknown."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from jaxinfra.config import Problem
from jaxinfra.data.tokenizer.base import Tokenizer, common_problems
from jaxinfra.errors import ConfigError

_CONTENT = b'{"vocabulary": "bytes"}\n'


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """The bytes of UTF-8 are the tokens.

    Attributes:
        end_of_document: how templates spell the token that ends documents; its id is 256.
    """

    end_of_document: str = "<|endoftext|>"

    def problems(self) -> Iterable[Problem]:
        """Yields what is wrong with the description."""
        yield from common_problems(None, self.end_of_document)


class ByteTokenizer(Tokenizer):
    """Bytes as tokens; id 256 ends documents."""

    kind = "bytes"
    file_name = "bytes.json"
    content = _CONTENT
    eot_id = 256
    vocab_size = 257

    def __init__(self, end_of_document: str):
        self.end_of_document = end_of_document
        self.special = {end_of_document: self.eot_id}

    @classmethod
    def restore(cls, content: bytes, end_of_document: str, name: str) -> Self:
        """See `Tokenizer`."""
        if content != _CONTENT:
            raise ConfigError(f"{name}: is not the description of the vocabulary of bytes; copy it anew")
        return cls(end_of_document)

    def encode_batch(self, texts: Sequence[str], *, inner: bool = False) -> list[list[int]]:
        """See `Tokenizer`."""
        return [list(text.encode()) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer`."""
        return bytes(index for index in ids if index < 256).decode(errors="replace")

    def byte_lengths(self) -> np.ndarray:
        """See `Tokenizer`."""
        lengths = np.ones(self.vocab_size, np.int32)
        lengths[self.eot_id] = 0
        return lengths
