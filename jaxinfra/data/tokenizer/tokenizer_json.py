"""Tokenizers in a tokenizer.json, as the library `tokenizers` reads them.

Adds three things to the library: a token that ends documents, a guarantee that ordinary text never becomes a special
token, and the number of bytes of each token.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Self, override

import numpy as np
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import Decoder
from tokenizers.pre_tokenizers import PreTokenizer

from jaxinfra.data.tokenizer.base import Tokenizer, byte_offsets, missing_end_of_document
from jaxinfra.errors import ConfigError
from jaxinfra.storage.errors import cause_of

_SPACE = "\u2581"  # SentencePiece's character for a space
_HIDDEN = "\U0010ffff"  # a noncharacter, which no text has


class JsonTokenizer(Tokenizer):
    """A tokenizer of the library `tokenizers`."""

    kind = "tokenizer_json"
    file_name = "tokenizer.json"

    def __init__(self, content: bytes, backend: Backend, end_of_document: str, name: str):
        """Takes the backend that `content` describes; it must not pad or truncate."""
        self.content = content
        self.end_of_document = end_of_document
        self._backend = backend
        self._backend.encode_special_tokens = True  # despite its name, it makes special tokens in texts ordinary text
        self._added = self._backend.get_added_tokens_decoder()
        self.special_tokens = {token.content: index for index, token in self._added.items() if token.special}
        self.eot_id = _end_of_document_id(self._backend, end_of_document, name)
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
        _end_of_document_id(backend, end_of_document, name)  # before `add_special_tokens` would add it
        backend.no_padding()
        backend.no_truncation()
        existing = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        backend.add_special_tokens([text for text in (end_of_document, *special) if text not in existing])
        return cls(backend.to_str().encode(), backend, end_of_document, name)

    @property
    def vocab(self) -> Mapping[str, int]:
        """The id of each token, by its text in the file."""
        return self._backend.get_vocab(with_added_tokens=True)

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
        # The decoder shows what tokens stand for. ByteLevel (GPT-2): each character of a token is a byte. ByteFallback
        # (SentencePiece): a token such as <0xE4> is a byte. Metaspace, or such a Replace: a ▁ is a space.
        steps = _steps(self._backend.decoder, "decoders")
        byte_level, byte_fallback = "ByteLevel" in steps, "ByteFallback" in steps
        replace = steps.get("Replace", {})
        decodes_space = "Metaspace" in steps or (
            replace.get("pattern", {}).get("String") == _SPACE and replace["content"] == " "
        )
        lengths = np.zeros(self.vocab_size, np.int32)
        for token, index in self._backend.get_vocab(with_added_tokens=True).items():
            added = self._added.get(index)
            if added is not None and added.special:
                lengths[index] = 0
            elif added is not None and byte_level:  # added tokens are not stored in byte-level characters
                lengths[index] = len(token.encode())
            elif byte_level:
                lengths[index] = len(token)
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
        """The backend for texts that start a document.

        `encode_special_tokens` is not enough if the special tokens are in the vocabulary of the model (unigram,
        word-level), which could still return their ids. Here they keep their ids, but a token such as <s> gets a text
        that no input has.
        """
        special = self.special_tokens.items()
        hidden = {text: _HIDDEN + text for text, index in special if _returns_id(self._backend, text, index)}
        if not hidden:
            return self._backend
        tree = json.loads(self._backend.to_str())  # not `content`, where merges may be strings, "a b"
        model = tree["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {hidden.get(text, text): index for text, index in model["vocab"].items()}
        else:  # a unigram model has a list of texts and scores, in the order of the ids
            model["vocab"] = [[hidden.get(text, text), score] for text, score in model["vocab"]]
        if "merges" in model:  # a merge with a text that is no longer in the vocabulary is an error
            model["merges"] = [pair for pair in model["merges"] if hidden.keys().isdisjoint((*pair, "".join(pair)))]
        if model.get("unk_token") in hidden:
            model["unk_token"] = hidden[model["unk_token"]]
        for token in tree["added_tokens"]:
            token["content"] = hidden.get(token["content"], token["content"])
        return _load_tree(tree)

    @cached_property
    def _continuation_encoder(self) -> Backend:
        """The backend for texts that follow a special token.

        It puts no space before them if `prepend_scheme` is "first". The scheme "always", and a `Prepend` normalizer
        alone, put one after every special token; that is kept, because models are trained on these tokens.
        """
        steps = _steps(self._start_encoder.pre_tokenizer, "pretokenizers")
        if steps.get("Metaspace", {}).get("prepend_scheme") != "first":
            return self._start_encoder
        tree = json.loads(self._start_encoder.to_str())
        for step in tree["pre_tokenizer"].get("pretokenizers", [tree["pre_tokenizer"]]):
            if step["type"] == "Metaspace":
                step["prepend_scheme"] = "never"
        normalizer = tree["normalizer"] or {}
        if "normalizers" in normalizer:  # `convert_sentence_piece` adds the space there too
            normalizer["normalizers"] = [step for step in normalizer["normalizers"] if step["type"] != "Prepend"]
        return _load_tree(tree)

    @cached_property
    @override
    def _special_token_pattern(self) -> re.Pattern[str]:
        def pattern(token: AddedToken) -> str:
            before, after = (r"\s*" if strips else "" for strips in (token.lstrip, token.rstrip))
            return before + re.escape(token.content) + after

        special = [token for token in self._added.values() if token.special]
        return re.compile("|".join(map(pattern, sorted(special, key=lambda token: -len(token.content)))))


def read_backend(content: bytes, name: str) -> Backend:
    """Parses the content of a tokenizer.json; ConfigError with `name` if it is not one."""
    try:
        return Backend.from_buffer(content)
    except Exception as error:  # the library has no error class of its own
        raise ConfigError(f"{name}: not a tokenizer.json ({cause_of(error)})") from None


def _load_tree(tree: dict[str, object]) -> Backend:
    """Loads a backend from the parsed JSON of a tokenizer.json; special tokens in texts are ordinary text to it."""
    backend = Backend.from_str(json.dumps(tree))
    backend.encode_special_tokens = True
    return backend


def _end_of_document_id(backend: Backend, end_of_document: str, name: str) -> int:
    """Returns the id of the token that ends documents; ConfigError if the backend lacks it."""
    index = backend.token_to_id(end_of_document)
    if index is None:
        special = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
        raise missing_end_of_document(name, end_of_document, special)
    return index


def _returns_id(backend: Backend, text: str, index: int) -> bool:
    """Returns whether the model gives this text this id, at the start of a document or later."""
    words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)] if backend.pre_tokenizer else [text]
    words += [word.removeprefix(_SPACE) for word in words]  # as they are later in a document
    return any(token.id == index for word in words for token in backend.model.tokenize(word))


def _steps(component: Decoder | PreTokenizer | None, list_name: str) -> dict[str, dict[str, Any]]:
    """Returns the steps of a decoder or pre-tokenizer by type; `list_name` is the JSON key of a sequence's steps."""
    if component is None:
        return {}
    tree = json.loads(component.__getstate__())
    return {step["type"]: step for step in tree.get(list_name, [tree])}
