"""Tokenizers in a tokenizer.json: any that the library `tokenizers` reads.

Adds what the library does not have: a token that ends documents, text that never becomes a special token, and the bytes
of each token.
"""

import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, Self, override

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import Decoder
from tokenizers.pre_tokenizers import PreTokenizer

from jaxinfra.data.tokenizer.base import Tokenizer, byte_offsets, missing_end_of_document
from jaxinfra.errors import ConfigError
from jaxinfra.storage.errors import cause_of

_SPACE = "\u2581"  # SentencePiece's character for a space
_UNSPELLABLE = "\U0010ffff"  # a noncharacter, which no text has


class JsonTokenizer(Tokenizer):
    """A tokenizer of the library `tokenizers`."""

    kind = "tokenizer_json"
    file_name = "tokenizer.json"

    def __init__(self, content: bytes, backend: Backend, end_of_document: str, name: str):
        """Takes the backend of `content`, which must not pad or truncate, and has a special end of document."""
        self.content = content
        self.end_of_document = end_of_document
        self._backend = backend
        self._backend.encode_special_tokens = True  # a text that spells a special token gets ordinary tokens
        self._added = self._backend.get_added_tokens_decoder()
        self.special_tokens = {token.content: index for index, token in self._added.items() if token.special}
        self.eot_id = _end_id(self._backend, end_of_document, name)
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    @override
    def from_bytes(cls, content: bytes, end_of_document: str, name: str) -> Self:
        return cls(content, read_backend(content, name), end_of_document, name)

    @classmethod
    def from_backend(cls, backend: Backend, end_of_document: str, name: str, special: Iterable[str] = ()) -> Self:
        """Adapts a backend in place, so that it does not pad or truncate and `end_of_document` is special.

        `special` are further special tokens, added if they are missing. ConfigError, with `name`, if the backend lacks
        `end_of_document`.
        """
        _end_id(backend, end_of_document, name)
        backend.no_padding()
        backend.no_truncation()
        existing = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        backend.add_special_tokens([text for text in (end_of_document, *special) if text not in existing])
        return cls(backend.to_str().encode(), backend, end_of_document, name)

    @override
    def encode_batch(self, texts: Sequence[str], *, continuation: bool = False) -> list[list[int]]:
        """Runs on all cores and releases the GIL."""
        encodings = self._encoder(continuation).encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    @override
    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=True)

    @override
    def byte_lengths(self) -> np.ndarray:
        steps = _steps(self._backend.decoder, "decoders")
        byte_level, byte_fallback = "ByteLevel" in steps, "ByteFallback" in steps
        replace = steps.get("Replace", {})
        decodes_space = "Metaspace" in steps or (
            replace.get("pattern", {}).get("String") == _SPACE and replace["content"] == " "
        )
        lengths = np.zeros(self.vocab_size, np.int32)
        for token, index in self._backend.get_vocab(with_added_tokens=True).items():
            if index in self._added and (byte_level or self._added[index].special):
                lengths[index] = 0 if self._added[index].special else len(token.encode())
            elif byte_level:
                lengths[index] = len(token)  # one character for each byte
            elif byte_fallback and re.fullmatch("<0x..>", token, re.DOTALL):
                lengths[index] = 1
            elif decodes_space:
                lengths[index] = len(token.replace(_SPACE, " ").encode())
            else:
                lengths[index] = len(self.decode([index]).encode())
        return lengths

    @override
    def _byte_spans(self, text: str, *, continuation: bool) -> np.ndarray:
        encoding = self._encoder(continuation).encode(text, add_special_tokens=False)
        return byte_offsets(text)[np.array(encoding.offsets)]

    def _encoder(self, continuation: bool) -> Backend:
        return self._continuation_encoder if continuation else self._start_encoder

    @cached_property
    def _start_encoder(self) -> Backend:
        """The backend for texts that start a document, whose model produces no special token.

        A unigram or word-level model could produce one: such tokens keep their ids, but get texts that nothing spells.
        """
        produced = [text for text, index in self.special_tokens.items() if _produces(self._backend, text, index)]
        if not produced:
            return self._backend
        tree = json.loads(self.content)
        model, hidden = tree["model"], {text: _UNSPELLABLE + text for text in produced}
        if isinstance(model["vocab"], dict):
            model["vocab"] = {hidden.get(text, text): index for text, index in model["vocab"].items()}
        else:
            model["vocab"] = [[hidden.get(text, text), score] for text, score in model["vocab"]]
        if "merges" in model:
            model["merges"] = [pair for pair in model["merges"] if hidden.keys().isdisjoint((*pair, "".join(pair)))]
        if model.get("unk_token") in hidden:
            model["unk_token"] = hidden[model["unk_token"]]
        for token in tree["added_tokens"]:
            token["content"] = hidden.get(token["content"], token["content"])
        return _load_tree(tree)

    @cached_property
    def _continuation_encoder(self) -> Backend:
        """The backend for texts that continue a document: it puts no space before them."""
        steps = _steps(self._start_encoder.pre_tokenizer, "pretokenizers")
        if steps.get("Metaspace", {}).get("prepend_scheme") != "first":
            return self._start_encoder
        tree = json.loads(self._start_encoder.to_str())
        for step in tree["pre_tokenizer"].get("pretokenizers", [tree["pre_tokenizer"]]):
            if step["type"] == "Metaspace":
                step["prepend_scheme"] = "never"
        normalizer = tree["normalizer"] or {}
        if "normalizers" in normalizer:
            normalizer["normalizers"] = [step for step in normalizer["normalizers"] if step["type"] != "Prepend"]
        return _load_tree(tree)

    @cached_property
    @override
    def _special_token_pattern(self) -> re.Pattern[str]:
        space, special = r"\s*", (token for token in self._added.values() if token.special)
        longest_first = sorted(special, key=lambda token: -len(token.content))
        patterns = (space * each.lstrip + re.escape(each.content) + space * each.rstrip for each in longest_first)
        return re.compile("|".join(patterns))


def read_backend(content: bytes, name: str) -> Backend:
    """Parses the content of a tokenizer.json; ConfigError with `name` if it is none."""
    try:
        return Backend.from_buffer(content)
    except Exception as error:  # the library raises the bare class
        raise ConfigError(f"{name}: not a tokenizer.json ({cause_of(error)})") from None


def _load_tree(tree: dict[str, object]) -> Backend:
    backend = Backend.from_str(json.dumps(tree))
    backend.encode_special_tokens = True
    return backend


def _end_id(backend: Backend, end_of_document: str, name: str) -> int:
    index = backend.token_to_id(end_of_document)
    if index is None:
        special = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
        raise missing_end_of_document(name, end_of_document, special)
    return index


def _produces(backend: Backend, text: str, index: int) -> bool:
    """Returns whether the model gives this text this id, at the start of a document or later."""
    words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)] if backend.pre_tokenizer else [text]
    words += [word.removeprefix(_SPACE) for word in words]
    return any(token.id == index for word in words for token in backend.model.tokenize(word))


def _steps(component: Decoder | PreTokenizer | None, list_name: str) -> dict[str, dict[str, Any]]:
    """Returns the steps of a decoder or pre-tokenizer by type; a sequence of them has a list `list_name`."""
    if component is None:
        return {}
    tree = json.loads(component.__getstate__())
    return {step["type"]: step for step in tree.get(list_name, [tree])}
