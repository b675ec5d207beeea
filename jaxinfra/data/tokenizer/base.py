"""What every tokenizer offers, and what all kinds of them share: a hash, pickling, the file that they are kept in."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Self

import numpy as np

from jaxinfra.config import Problem
from jaxinfra.errors import ConfigError


class Tokenizer(ABC):
    """A vocabulary whose `eot_id` ends documents.

    `content` is all that there is to it: `restore` makes the same tokenizer of it in another process, or from a
    store, and pickling does just that.

    Attributes:
        kind: names the class in a manifest.
        file_name: what `content` is called in a store.
        content: the bytes of that file, canonical: equal vocabularies have equal bytes.
        end_of_document: the special token that ends documents.
        eot_id: its id.
        vocab_size: one more than the largest token id.
    """

    kind: ClassVar[str]
    file_name: ClassVar[str]

    content: bytes
    end_of_document: str
    eot_id: int
    vocab_size: int

    @classmethod
    @abstractmethod
    def restore(cls, content: bytes, end_of_document: str, name: str) -> Self:
        """Makes the tokenizer whose `content` this is.

        Raises:
            ConfigError: it is none, or it has no such end of a document; the message calls it `name`.
        """

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of one text, without an end of document; never a special token, whatever the text spells."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, as `encode` gives them."""

    @abstractmethod
    def encode_control(self, text: str) -> list[int]:
        """Token ids of the text of a template: special tokens that are spelt in it become those tokens."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; special tokens and unknown ids have none, bytes that are not UTF-8 become U+FFFD."""

    @abstractmethod
    def byte_lengths(self) -> np.ndarray:
        """Bytes of text that each id stands for, int32[vocab_size]; special tokens and holes have 0.

        The lengths of the ids of a text sum to its bytes where the vocabulary is one of bytes (byte-level BPE,
        tiktoken, bytes) or falls back to them and rewrites nothing. One that puts a space before every text counts it.
        """

    @cached_property
    def sha256(self) -> str:
        """Hash of `content`, in hexadecimal."""
        return hashlib.sha256(self.content).hexdigest()

    def save(self, path: Path) -> None:
        """Writes `content`."""
        path.write_bytes(self.content)

    def __reduce__(self):
        return type(self).restore, (self.content, self.end_of_document, self.file_name)


def no_end(name: str, end_of_document: str, special: Iterable[str]) -> ConfigError:
    """The error for a tokenizer that lacks the token that should end its documents."""
    found = sorted(special)
    some = ", ".join(found[:8]) + (", ..." if len(found) > 8 else "")
    return ConfigError(
        f"end_of_document={end_of_document}: {name} has no such token; "
        f"name the one that ends its documents{f', of {some}' if found else ''}"
    )


def common_problems(path: str | None, end_of_document: str) -> Iterable[Problem]:
    """Yields what is wrong with the fields that most descriptions of a tokenizer have; None stands for no path."""
    if path == "":
        yield Problem(fields=("path",), message="names no file", fix="give the path or URL of the file")
    if not end_of_document:
        yield Problem(fields=("end_of_document",), message="must not be empty", fix="use end_of_document=<|endoftext|>")
