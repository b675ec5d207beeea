"""What every tokenizer offers, and what all kinds of them share: a hash, pickling, the file that they are kept in."""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import ClassVar, Self

import numpy as np

from jaxinfra.errors import ConfigError


class Tokenizer(ABC):
    """A vocabulary whose `eot_id` ends documents.

    `content` is all that there is to it: `from_bytes` makes the same tokenizer of it in another process, or from a
    store, and pickling does just that.
    """

    kind: ClassVar[str]  # names the class in a manifest
    file_name: ClassVar[str]  # what `content` is called in a store

    content: bytes  # the bytes of that file, canonical: equal vocabularies have equal bytes
    end_of_document: str  # the special token that ends documents
    eot_id: int  # its id
    vocab_size: int  # one more than the largest token id
    special_tokens: Mapping[str, int]  # ids of the special tokens by their text

    @classmethod
    @abstractmethod
    def from_bytes(cls, content: bytes, end_of_document: str, name: str) -> Self:
        """Makes the tokenizer whose `content` this is; ConfigError where it is none or lacks that end of a document."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str], *, continuation: bool = False) -> list[list[int]]:
        """Token ids of each text, without ends of documents; never a special token, whatever a text spells.

        A text is a document, or a part of one between special tokens. Where a vocabulary puts a space before a
        document, it puts none before `continuation` texts, which something in their documents comes before.
        """

    def encode(self, text: str, *, continuation: bool = False) -> list[int]:
        """Token ids of one text, as `encode_batch` gives them."""
        return self.encode_batch([text], continuation=continuation)[0]

    def encode_with_byte_spans(self, text: str, *, continuation: bool = False) -> tuple[list[int], np.ndarray]:
        """Token ids of a text as by `encode`, and the bytes that each stands for, from the first to before the second.

        These are int64[N, 2]. A token for a part of a character may get the whole of it.
        """
        ids = self.encode(text, continuation=continuation)
        ends_N = np.cumsum(self._byte_lengths_V[ids], dtype=np.int64)
        if len(ids) and ends_N[-1] != len(text.encode()):
            return ids, self._located(text, continuation=continuation)
        return ids, np.stack([np.concatenate([[0], ends_N[:-1]])[: len(ids)], ends_N], axis=1)

    def split(self, text: str) -> list[str | int]:
        """The text of a template, cut at the special tokens that it spells, which are given as their ids."""
        parts, start = [], 0
        for found in self._spelt.finditer(text):
            if found.start() > start:
                parts.append(text[start : found.start()])
            parts.append(self.special_tokens[found[0] if found[0] in self.special_tokens else found[0].strip()])
            start = found.end()
        return [*parts, text[start:]] if start < len(text) else parts

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; special tokens and unknown ids have none, bytes that are not UTF-8 become U+FFFD."""

    @abstractmethod
    def byte_lengths(self) -> np.ndarray:
        """Bytes of text that each id stands for, int32[vocab_size]; special tokens and holes have 0.

        The lengths of the ids of a text sum to its bytes where the vocabulary is one of bytes (byte-level BPE,
        tiktoken, bytes) or falls back to them and rewrites nothing. One that puts a space before every text counts it.
        """

    def _located(self, text: str, *, continuation: bool) -> np.ndarray:
        """As `encode_with_byte_spans`, from the library: for vocabularies that rewrite texts."""
        raise AssertionError(f"{self.kind} has tokens of other bytes than those of the text")

    @cached_property
    def _byte_lengths_V(self) -> np.ndarray:
        return self.byte_lengths()

    @cached_property
    def _spelt(self) -> re.Pattern[str]:
        """Finds special tokens in the text of a template, the longest one that fits."""
        return re.compile("|".join(map(re.escape, sorted(self.special_tokens, key=len, reverse=True))))

    @cached_property
    def sha256(self) -> str:
        """Hash of `content`, in hexadecimal."""
        return hashlib.sha256(self.content).hexdigest()

    def __reduce__(self):
        return type(self).from_bytes, (self.content, self.end_of_document, self.file_name)


def missing_end_of_document(name: str, end_of_document: str, special: Iterable[str]) -> ConfigError:
    """The error for a tokenizer that lacks the token that should end its documents."""
    found = sorted(special)
    some = ", ".join(found[:8]) + (", ..." if len(found) > 8 else "")
    return ConfigError(
        f"end_of_document={end_of_document}: {name} has no such token; "
        f"name the one that ends its documents{f', of {some}' if found else ''}"
    )


def byte_offsets(text: str) -> np.ndarray:
    """Bytes of UTF-8 before each character of a text, and of all: int64[characters + 1]."""
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    sizes = 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)
    return np.concatenate([[0], np.cumsum(sizes)])
