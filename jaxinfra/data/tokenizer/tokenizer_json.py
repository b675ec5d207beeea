"""Vocabularies in a tokenizer.json: any that the library `tokenizers` reads, and a byte-level BPE that it trains.

It adds what that library leaves open: one token that ends a document, text that can never spell a special token, and
the bytes that each token stands for.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxinfra.config import Problem
from jaxinfra.data.tokenizer.base import Tokenizer, bytes_before, common_problems, no_end
from jaxinfra.errors import ConfigError
from jaxinfra.storage.errors import cause_of
from jaxinfra.storage.files import read_content

_SPACE = "\u2581"  # how SentencePiece, and what follows it, spells a space


@dataclass(frozen=True, kw_only=True)
class TrainBpe:
    """A byte-level BPE that is trained on the text of the recipe.

    Attributes:
        vocab_size: the largest vocabulary; a small text gives fewer tokens.
        end_of_document: the special token that closes every document; its id is 0.
        special_tokens: more of them, such as those of a template; their ids follow.
    """

    vocab_size: int = 8192
    end_of_document: str = "<|endoftext|>"
    special_tokens: tuple[str, ...] = ()

    def problems(self) -> Iterable[Problem]:
        """Yields what is wrong with the description."""
        yield from common_problems(end_of_document=self.end_of_document, special_tokens=self.special_tokens)
        least = 257 + len(self.special_tokens)
        if self.vocab_size < least:
            yield Problem(
                fields=("vocab_size",),
                message="a byte-level vocabulary needs 256 bytes, the end of a document and its special tokens",
                fix=f"use vocab_size={least} or more",
            )


@dataclass(frozen=True, kw_only=True)
class TokenizerFile:
    """An existing tokenizer.json.

    Attributes:
        path: of the file, or its URL.
        end_of_document: the special token that closes every document.
        special_tokens: those that must be special, such as those of a template. What the file lacks is added to it:
            ids follow its last one.
    """

    path: str = ""
    end_of_document: str = "<|endoftext|>"
    special_tokens: tuple[str, ...] = ()

    def problems(self) -> Iterable[Problem]:
        """Yields what is wrong with the description."""
        yield from common_problems(
            path=self.path, end_of_document=self.end_of_document, special_tokens=self.special_tokens
        )


def load_json(config: TokenizerFile) -> "JsonTokenizer":
    """Reads a tokenizer.json.

    Raises:
        ConfigError: there is no such file, it is no tokenizer, or it lacks the end of a document.
    """
    backend = _backend(read_content(config.path, "a tokenizer"), config.path)
    return _prepared(backend, config.end_of_document, config.path, config.special_tokens)


def train_bpe(
    texts: Iterable[str], *, vocab_size: int, end_of_document: str, special_tokens: Sequence[str] = ()
) -> "JsonTokenizer":
    """Trains a byte-level BPE (Sennrich et al. 2016, on bytes as in GPT-2); its id 0 ends documents.

    The same texts in the same order give the same tokenizer. A small text may give fewer than
    `vocab_size` tokens.
    """
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[end_of_document, *special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return _prepared(backend, end_of_document, "the trained tokenizer")


class JsonTokenizer(Tokenizer):
    """A vocabulary of the library `tokenizers`."""

    kind = "tokenizer_json"
    file_name = "tokenizer.json"

    def __init__(self, content: bytes, backend: Backend, end_of_document: str, name: str):
        """Takes what `content` was read as: its end of document is special, and it neither pads nor truncates."""
        self.content = content
        self.end_of_document = end_of_document
        self._backend = backend
        self._backend.encode_special_tokens = True  # a text that spells a special token gets ordinary tokens
        self._added = self._backend.get_added_tokens_decoder()
        self.special = {token.content: index for index, token in self._added.items() if token.special}
        self._respelt = self._respell()
        self.eot_id = _end_id(self._backend, end_of_document, name)
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def restore(cls, content: bytes, end_of_document: str, name: str) -> Self:
        """See `Tokenizer`."""
        return cls(content, _backend(content, name), end_of_document, name)

    def encode_batch(self, texts: Sequence[str], *, inner: bool = False) -> list[list[int]]:
        """See `Tokenizer`; runs on all cores and releases the GIL."""
        backend = self._inner if inner else self._backend
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._ordinary(encoding.ids) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer`."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def byte_lengths(self) -> np.ndarray:
        """See `Tokenizer`."""
        steps = _steps(self._backend.decoder, "decoders")
        byte_level = "ByteLevel" in steps
        byte_fallback = "ByteFallback" in steps
        spaces = "Metaspace" in steps or any(_is_space(step) for step in steps.values())
        lengths = np.zeros(self.vocab_size, np.int32)
        for token, index in self._backend.get_vocab(with_added_tokens=True).items():
            if index in self._added and (byte_level or self._added[index].special):
                lengths[index] = 0 if self._added[index].special else len(token.encode())
            elif byte_level:
                lengths[index] = len(token)  # spelt with one character a byte
            elif byte_fallback and _is_byte(token):
                lengths[index] = 1
            elif spaces:
                lengths[index] = len(token.replace(_SPACE, " ").encode())
            else:
                lengths[index] = len(self.decode([index]).encode())
        return lengths

    def _located(self, text: str, *, inner: bool) -> np.ndarray:
        encoding = (self._inner if inner else self._backend).encode(text, add_special_tokens=False)
        times = [len(self._respelt.get(index, (index,))) for index in encoding.ids]
        return np.repeat(bytes_before(text)[np.array(encoding.offsets)], times, axis=0)

    @cached_property
    def _inner(self) -> Backend:
        """The backend for texts that do not begin a document."""
        steps = _steps(self._backend.pre_tokenizer, "pretokenizers")
        if steps.get("Metaspace", {}).get("prepend_scheme") != "first":
            return self._backend
        tree = json.loads(self.content)
        for step in tree["pre_tokenizer"].get("pretokenizers", [tree["pre_tokenizer"]]):
            if step["type"] == "Metaspace":
                step["prepend_scheme"] = "never"
        inner = Backend.from_str(json.dumps(tree))
        inner.encode_special_tokens = True
        return inner

    @cached_property
    def _spelt(self) -> re.Pattern[str]:
        spelt = sorted(
            (token for token in self._added.values() if token.special), key=lambda token: -len(token.content)
        )
        return re.compile(
            "|".join(
                (r"\s*" if token.lstrip else "") + re.escape(token.content) + (r"\s*" if token.rstrip else "")
                for token in spelt
            )
        )

    def _ordinary(self, ids: list[int]) -> list[int]:
        if self._respelt and not self._respelt.keys().isdisjoint(ids):
            return [part for index in ids for part in self._respelt.get(index, (index,))]
        return ids

    def _respell(self) -> dict[int, list[int]]:
        """Other ids for special tokens that the model itself finds in ordinary text, as one of unigrams does.

        The token for what is unknown is not spelt by a text, but stands for what cannot be.
        """
        spelt = {index: text for text, index in self.special.items() if index in _ids(self._backend, text)}
        if spelt:
            model = json.loads(self.content)["model"]
            spelt.pop(model.get("unk_id", self._backend.token_to_id(model.get("unk_token") or "")), None)
        respelt = {}
        for index, text in spelt.items():
            parts = [part for letter in text for part in _ids(self._backend, letter)]
            respelt[index] = [part for part in parts if part not in spelt]
        return respelt


def _backend(content: bytes, name: str) -> Backend:
    try:
        return Backend.from_buffer(content)
    except Exception as error:  # the library raises the bare class
        raise ConfigError(f"{name}: is not a tokenizer.json ({cause_of(error)})") from None


def _end_id(backend: Backend, end_of_document: str, name: str) -> int:
    index = backend.token_to_id(end_of_document)
    if index is None:
        special = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
        raise no_end(name, end_of_document, special)
    return index


def _prepared(backend: Backend, end_of_document: str, name: str, special: Sequence[str] = ()) -> JsonTokenizer:
    """A tokenizer that neither cuts nor pads texts, whose end of a document and other tokens are special."""
    _end_id(backend, end_of_document, name)
    backend.no_padding()
    backend.no_truncation()
    already = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    backend.add_special_tokens([text for text in (end_of_document, *special) if text not in already])
    return JsonTokenizer(backend.to_str().encode(), backend, end_of_document, name)


def _ids(backend: Backend, text: str) -> list[int]:
    return [token.id for token in backend.model.tokenize(text)]


def _steps(part: Any, parts: str) -> dict[str, dict[str, Any]]:
    """The steps of a decoder or of a pre-tokenizer by their type; a sequence of them has them as `parts`."""
    if part is None:
        return {}
    tree = json.loads(part.__getstate__())
    return {step["type"]: step for step in tree.get(parts, [tree])}


def _is_space(step: dict[str, Any]) -> bool:
    return step["type"] == "Replace" and step["pattern"].get("String") == _SPACE and step["content"] == " "


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")
