"""The interface of tokenizers, with the hash and the pickling that all kinds share.

Shape suffixes: N tokens of a text, V ids of the vocabulary.
"""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import ClassVar, Self

import numpy as np

from jaxinfra.errors import ConfigError, quoted


class Tokenizer(ABC):
    """A tokenizer with a token, `eot_id`, that ends documents.

    `content` is its serialized form: `from_bytes` loads an equal tokenizer from it, and unpickling calls `from_bytes`.
    """

    kind: ClassVar[str]  # name of the class in a manifest
    file_name: ClassVar[str]  # name of the file in a store that holds `content`

    content: bytes  # equal tokenizers have equal bytes
    end_of_document: str  # text of the special token that ends documents
    eot_id: int  # id of that token
    vocab_size: int  # one more than the largest token id
    special_tokens: Mapping[str, int]  # text -> id

    @classmethod
    @abstractmethod
    def from_bytes(cls, content: bytes, end_of_document: str, name: str) -> Self:
        """Loads a tokenizer from its `content`; ConfigError with `name` if it is damaged or lacks `end_of_document`."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str], *, continuation: bool = False) -> list[list[int]]:
        """Returns the token ids of each text, without special tokens and ends of documents.

        Args:
            texts: documents, or parts of documents between special tokens.
            continuation: whether the texts follow a special token. A tokenizer that puts a space before the document
                only, and not after special tokens, then puts none.
        """

    def encode(self, text: str, *, continuation: bool = False) -> list[int]:
        """Returns the token ids of one text, like `encode_batch`."""
        return self.encode_batch([text], continuation=continuation)[0]

    def encode_with_byte_spans(self, text: str, *, continuation: bool = False) -> tuple[list[int], np.ndarray]:
        """Returns the token ids of a text, and the range of UTF-8 bytes of each, int64[N, 2] as [start, end).

        If "naïve" has the tokens "na" and "ïve", the ranges are [0, 2] and [2, 6]. A token for a part of a character
        may have the range of the whole character.
        """
        ids = self.encode(text, continuation=continuation)
        length_N = self._byte_lengths_V[ids]
        end_N = np.cumsum(length_N, dtype=np.int64)
        if len(ids) and end_N[-1] != len(text.encode()):  # the tokenizer normalizes the text or adds a space
            return ids, self._byte_spans(text, continuation=continuation)
        return ids, np.stack([end_N - length_N, end_N], axis=1)

    def split(self, text: str) -> list[str | int]:
        """Splits template text at its special tokens: returns the id of each, and the text between them."""
        parts, start = [], 0
        for match in self._special_token_pattern.finditer(text):
            if match.start() > start:
                parts.append(text[start : match.start()])
            # The match includes white space where the token strips it.
            parts.append(self.special_tokens[match[0] if match[0] in self.special_tokens else match[0].strip()])
            start = match.end()
        return [*parts, text[start:]] if start < len(text) else parts

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids without special tokens and unknown ids; bytes that are not UTF-8 become U+FFFD."""

    @abstractmethod
    def byte_lengths(self) -> np.ndarray:
        """Returns the number of UTF-8 bytes of each id, int32[vocab_size]; 0 for special tokens and unused ids.

        They add up to the size of a text if the tokenizer is byte-level (byte-level BPE, tiktoken, bytes), or falls
        back to bytes and does not normalize. The space that some tokenizers put before every text is counted.
        """

    def _byte_spans(self, text: str, *, continuation: bool) -> np.ndarray:
        """Returns the byte ranges of `encode_with_byte_spans` for tokenizers that rewrite texts."""
        raise AssertionError(f"{self.kind}: the tokens have other bytes than the text")

    @cached_property
    def _byte_lengths_V(self) -> np.ndarray:
        return self.byte_lengths()

    @cached_property
    def _special_token_pattern(self) -> re.Pattern[str]:
        """Matches special tokens in template text; longest first, because one may begin with another."""
        return re.compile("|".join(map(re.escape, sorted(self.special_tokens, key=len, reverse=True))))

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of `content`, in hexadecimal."""
        return hashlib.sha256(self.content).hexdigest()

    def __reduce__(self):
        return type(self).from_bytes, (self.content, self.end_of_document, self.file_name)


def missing_end_of_document(name: str, end_of_document: str, special: Iterable[str]) -> ConfigError:
    """Returns the error for a tokenizer without the token that should end documents."""
    tokens = [quoted(token) for token in sorted(special)]
    choices = ", ".join(tokens[:8]) + (", ..." if len(tokens) > 8 else "")
    return ConfigError(
        f"end_of_document={end_of_document}: {name} has no such token; "
        f"name the one that ends its documents{f', one of {choices}' if tokens else ''}"
    )


def byte_offsets(text: str) -> np.ndarray:
    """Returns the byte offset of each character in UTF-8, and the size of the text: int64[characters + 1]."""
    code_points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    # UTF-8 takes 2 bytes from U+0080, 3 from U+0800 and 4 from U+10000.
    sizes = 1 + np.digitize(code_points, [0x80, 0x800, 0x10000])
    return np.concatenate([[0], np.cumsum(sizes)])
