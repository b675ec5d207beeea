"""The byte tokenizer: 256 bytes and special tokens. It needs no training and can encode any text."""

import json
from collections.abc import Sequence
from typing import Self, override

import numpy as np

from jaxinfra.data.tokenizer.base import Tokenizer
from jaxinfra.errors import ConfigError


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as tokens: the ids below `eot_id` are the bytes, and the special tokens have the ids from it on."""

    kind = "bytes"
    file_name = "bytes.json"
    eot_id = 256

    def __init__(self, end_of_document: str, special_tokens: Sequence[str] = ()):
        self.end_of_document = end_of_document
        special = enumerate((end_of_document, *special_tokens), start=self.eot_id)
        self.special_tokens = {text: index for index, text in special}
        self.vocab_size = self.eot_id + len(self.special_tokens)
        self.content = json.dumps({"vocabulary": "bytes", "special_tokens": list(special_tokens)}).encode()

    @classmethod
    @override
    def from_bytes(cls, content: bytes, end_of_document: str, name: str) -> Self:
        try:
            tokenizer = cls(end_of_document, json.loads(content)["special_tokens"])
        except (ValueError, KeyError, TypeError):
            tokenizer = None
        if tokenizer is None or tokenizer.content != content:
            raise ConfigError(f"{name}: damaged description of a byte tokenizer; prepare or copy the store again")
        return tokenizer

    @override
    def encode_batch(self, texts: Sequence[str], *, continuation: bool = False) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    @override
    def decode(self, ids: Sequence[int]) -> str:
        return bytes(index for index in ids if index < self.eot_id).decode(errors="replace")

    @override
    def byte_lengths(self) -> np.ndarray:
        return (np.arange(self.vocab_size) < self.eot_id).astype(np.int32)
