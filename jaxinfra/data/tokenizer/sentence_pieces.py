"""Vocabularies of SentencePiece (Kudo and Richardson 2018): a `.model` file.

Pieces of type *control* are never found in a text by the library. Those that a model calls *user defined* are, be
they markers of turns or HTML tags: which of them only a template may spell is decided when the file is read, and
written into the content as their type.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np

from jaxinfra.config import Problem
from jaxinfra.data.tokenizer.base import Tokenizer, common_problems, no_end, threads
from jaxinfra.errors import ConfigError
from jaxinfra.packages import needed
from jaxinfra.storage.errors import cause_of
from jaxinfra.storage.files import read_content

_SPACE = "\u2581"
_MARKER = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")


@dataclass(frozen=True, kw_only=True)
class SentencePieceModel:
    """A model of SentencePiece.

    Attributes:
        path: of the `.model` file, or its URL.
        special_tokens: user-defined pieces that only a template may spell; None is all that look like `<...>` or
            `[...]`. Control pieces and the end of a document always are.
        end_of_document: the piece that closes every document.
    """

    path: str = ""
    special_tokens: tuple[str, ...] | None = None
    end_of_document: str = "</s>"

    def problems(self) -> Iterable[Problem]:
        """Yields what is wrong with the description."""
        yield from common_problems(path=self.path, end_of_document=self.end_of_document)


def load_sentence_pieces(config: SentencePieceModel) -> "SentencePieceTokenizer":
    """Reads a model of SentencePiece.

    Raises:
        ConfigError: there is no such file, it is no model, it lacks a special token, or sentencepiece is missing.
    """
    model = _parse(read_content(config.path, "a tokenizer"), config.path)
    types = model.SentencePiece
    by_text = {piece.piece: piece for piece in model.pieces}
    defined = [piece for piece in model.pieces if piece.type == types.USER_DEFINED]
    special = config.special_tokens
    if special is None:
        special = tuple(piece.piece for piece in defined if _MARKER.fullmatch(piece.piece))
    for text in (*special, config.end_of_document):
        piece = by_text.get(text)
        if piece is None or piece.type not in (types.CONTROL, types.USER_DEFINED):
            found = [piece.piece for piece in model.pieces if piece.type == types.CONTROL]
            found += [piece.piece for piece in defined if _MARKER.fullmatch(piece.piece)]
            if text == config.end_of_document:
                raise no_end(config.path, text, found)
            raise ConfigError(f"special_tokens: {config.path} has no special piece {text}; it has {', '.join(found)}")
        piece.type = types.CONTROL
    content = model.SerializeToString(deterministic=True)
    return SentencePieceTokenizer.restore(content, config.end_of_document, config.path)


class SentencePieceTokenizer(Tokenizer):
    """A vocabulary of the library sentencepiece; a text is normalised as its model says."""

    kind = "sentencepiece"
    file_name = "tokenizer.model"

    def __init__(self, content: bytes, processor: Any, end_of_document: str):
        """Takes the library's `SentencePieceProcessor`, of which `content` is the file."""
        self.content = content
        self.end_of_document = end_of_document
        self.vocab_size = processor.get_piece_size()
        self.eot_id = processor.piece_to_id(end_of_document)
        self._processor = processor
        control = [index for index in range(self.vocab_size) if processor.is_control(index)]
        self.special = {processor.id_to_piece(index): index for index in control}

    @classmethod
    def restore(cls, content: bytes, end_of_document: str, name: str) -> Self:
        """See `Tokenizer`."""
        processor = _library().SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(content)
        except RuntimeError as error:
            raise ConfigError(f"{name}: is not a model of SentencePiece ({cause_of(error)}); copy it anew") from None
        if not processor.is_control(processor.piece_to_id(end_of_document)):
            raise no_end(name, end_of_document, ())
        return cls(content, processor, end_of_document)

    def encode_batch(self, texts: Sequence[str], *, inner: bool = False) -> list[list[int]]:
        """See `Tokenizer`; runs on `threads`."""
        processor = self._inner if inner else self._processor
        return processor.encode(list(texts), num_threads=threads())

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer`."""
        return self._processor.decode([index for index in ids if index < self.vocab_size])

    def byte_lengths(self) -> np.ndarray:
        """See `Tokenizer`."""
        processor = self._processor
        lengths = np.zeros(self.vocab_size, np.int32)
        for index in range(self.vocab_size):
            if processor.is_byte(index):
                lengths[index] = 1
            elif not (processor.is_control(index) or processor.is_unknown(index) or processor.is_unused(index)):
                lengths[index] = len(processor.id_to_piece(index).replace(_SPACE, " ").encode())
        return lengths

    def _located(self, text: str, *, inner: bool) -> np.ndarray:
        processor = self._inner if inner else self._processor
        serialized = processor.encode(text, out_type="serialized_proto")
        found = _library().sentencepiece_pb2.SentencePieceText.FromString(serialized)
        return np.array([(piece.begin, piece.end) for piece in found.pieces], np.int64)

    @cached_property
    def _inner(self) -> Any:
        """The processor that puts no space before a text."""
        model = _parse(self.content, self.file_name)
        if not model.normalizer_spec.add_dummy_prefix:
            return self._processor
        model.normalizer_spec.add_dummy_prefix = False
        return _library().SentencePieceProcessor(model_proto=model.SerializeToString())


def _library() -> Any:
    parts = "sentencepiece_model_pb2", "sentencepiece_pb2"
    return needed("sentencepiece", *parts, by="tokenizer=sentence_piece_model", install="jaxinfra[sentencepiece]")


def _parse(content: bytes, name: str) -> Any:
    """The model as a protocol buffer."""
    from google.protobuf.message import DecodeError

    form = _library().sentencepiece_model_pb2.ModelProto
    try:
        model = form.FromString(content)
    except DecodeError as error:
        raise ConfigError(f"{name}: is not a model of SentencePiece ({cause_of(error)}); give its .model") from None
    if not model.pieces:
        raise ConfigError(f"{name}: is not a model of SentencePiece (it has no pieces); give its .model")
    return model
