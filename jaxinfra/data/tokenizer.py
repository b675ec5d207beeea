"""Text to token ids and back: a thin typed face of the `tokenizers` library.

It adds what that library leaves open: one token that ends a document, text that can never spell that token, a
hash, and decoding of a stream. It knows nothing of files of text or of stores.
"""

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxinfra.errors import ConfigError

_REPLACEMENT = "\ufffd"  # what bytes that are not (yet) UTF-8 decode to


class Tokenizer:
    """A tokenizer whose `eot_id` ends documents."""

    def __init__(self, backend: Backend, end_of_document: str):
        eot_id = backend.token_to_id(end_of_document)
        if eot_id is None:
            raise ConfigError(
                f"data.corpus.end_of_document={end_of_document}: the tokenizer has no such token; "
                "name the one that ends its documents"
            )
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True  # a text that spells a special token gets ordinary tokens
        self._backend = backend
        self.end_of_document = end_of_document
        self.eot_id = int(eot_id)

    @classmethod
    def load(cls, path: Path | str, end_of_document: str) -> "Tokenizer":
        """Reads a tokenizer.json.

        Raises:
            ConfigError: there is no such file, it is no tokenizer, or it lacks the end of a document.
        """
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read as a tokenizer ({error.strerror}); check the path") from None
        return cls.from_bytes(content, end_of_document, name=str(path))

    @classmethod
    def from_bytes(cls, content: bytes, end_of_document: str, *, name: str) -> "Tokenizer":
        """Builds a tokenizer from the content of a tokenizer.json; `name` is for the error."""
        try:
            backend = Backend.from_buffer(content)
        except Exception as error:  # the library raises the bare class
            raise ConfigError(f"{name}: is not a tokenizer.json ({_one_line(error)})") from None
        return cls(backend, end_of_document)

    @classmethod
    def train_bpe(cls, texts: Iterable[str], *, vocab_size: int, end_of_document: str) -> "Tokenizer":
        """Trains a byte-level BPE (Sennrich et al. 2016, on bytes as in GPT-2); its id 0 ends documents.

        The same texts in the same order give the same tokenizer. A small text may give fewer than
        `vocab_size` tokens.
        """
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[end_of_document],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend, end_of_document)

    @cached_property
    def json(self) -> str:
        """The text of its tokenizer.json."""
        return self._backend.to_str()

    @property
    def sha256(self) -> str:
        """Hash of the tokenizer.json that `save` writes."""
        return hashlib.sha256(self.json.encode()).hexdigest()

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    def save(self, path: Path) -> None:
        """Writes the tokenizer.json."""
        path.write_text(self.json, encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """Token ids of one text, without an end of document."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without ends of documents; runs on all cores and releases the GIL."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; special tokens have none, bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def byte_lengths(self) -> np.ndarray:
        """Bytes of text that each id stands for, int32[vocab_size]; special tokens and holes have 0.

        Exact for byte-level vocabularies, whose tokens are spelt with one character a byte.
        """
        lengths = np.zeros(self.vocab_size, np.int32)
        byte_level = "ByteLevel" in str(self._backend.decoder)
        for token, index in self._backend.get_vocab(with_added_tokens=False).items():
            lengths[index] = len(token) if byte_level else len(self.decode([index]).encode())
        for index, added in self._backend.get_added_tokens_decoder().items():
            lengths[index] = 0 if added.special else len(added.content.encode())
        return lengths


class StreamDecoder:
    """Decodes ids one at a time; what was pushed so far plus `flush` is the text of all ids.

    Text is held back only while its last bytes may still become one character. The ids of the last complete
    piece stay as left context, for decoders that treat the first token of a text in a special way.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._pending: list[int] = []
        self._emitted = 0  # characters of the pending text that are out already

    def push(self, token_id: int) -> str:
        """The text that this id completes; empty while a character is unfinished."""
        self._pending.append(token_id)
        text = self._pending_text()
        complete = text.rstrip(_REPLACEMENT)
        piece = complete[self._emitted :]
        if complete == text:
            self._context, self._pending, self._emitted = self._pending, [], 0
        else:
            self._emitted = max(self._emitted, len(complete))
        return piece

    def flush(self) -> str:
        """What is left when no more ids come; unfinished bytes become U+FFFD."""
        piece = self._pending_text()[self._emitted :]
        self._context, self._pending, self._emitted = [], [], 0
        return piece

    def _pending_text(self) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._pending)[len(before) :]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
