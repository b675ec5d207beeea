"""Encodes documents to token ids, and marks the tokens that count in the loss.

The text between two special tokens is encoded as a whole, as when the model is used. So a token may reach across spans;
it counts in the loss if any of its text does. Shape suffixes: N tokens of a text or document, 2 its start and end.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxinfra.data.tokenizer import Tokenizer
from jaxinfra.prepare.documents.document import Document, Span


@dataclass(frozen=True, kw_only=True)
class EncodedDocument:
    """Tokens of a document without the end-of-document token."""

    ids_N: np.ndarray  # int64
    in_loss_N: np.ndarray  # uint8, as `Span.in_loss`
    num_bytes: int  # of the text in UTF-8


@dataclass(kw_only=True)
class _Piece:
    """One special token, or the text between two special tokens; `encode_documents` fills in the tokens of a text."""

    spans: list[Span] = field(default_factory=list)  # the text; [] for a special token
    continuation: bool = False  # whether a special token comes before the text
    ids_N: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    in_loss_N: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8))

    @property
    def text(self) -> str:
        return "".join(span.text for span in self.spans)

    @property
    def is_partly_in_loss(self) -> bool:
        return len({span.in_loss for span in self.spans}) > 1


def encode_documents(tokenizer: Tokenizer, documents: Sequence[Document]) -> list[EncodedDocument]:
    """Encodes documents in large batches, which the tokenizer spreads over its threads."""
    pieces_of_documents = [_split_at_special_tokens(tokenizer, document) for document in documents]
    texts = [piece for pieces in pieces_of_documents for piece in pieces if piece.spans]
    for continuation in (False, True):
        batch = [piece for piece in texts if piece.continuation == continuation and not piece.is_partly_in_loss]
        batch_ids = tokenizer.encode_batch([piece.text for piece in batch], continuation=continuation)
        for piece, ids in zip(batch, batch_ids, strict=True):
            piece.ids_N = np.array(ids, np.int64)
            piece.in_loss_N = np.full(len(ids), piece.spans[0].in_loss, np.uint8)
    for piece in texts:
        if piece.is_partly_in_loss:
            _encode_partly_in_loss(tokenizer, piece)
    return [
        EncodedDocument(
            ids_N=np.concatenate([np.empty(0, np.int64), *(piece.ids_N for piece in pieces)]),
            in_loss_N=np.concatenate([np.empty(0, np.uint8), *(piece.in_loss_N for piece in pieces)]),
            num_bytes=sum(len(piece.text.encode()) for piece in pieces),
        )
        for pieces in pieces_of_documents
    ]


def _split_at_special_tokens(tokenizer: Tokenizer, document: Document) -> list[_Piece]:
    """Splits a document into its special tokens, already encoded, and the texts between them."""
    pieces: list[_Piece] = []
    for span in document:
        for part in tokenizer.split(span.text) if span.from_template else [span.text]:
            if isinstance(part, int):
                pieces.append(_Piece(ids_N=np.array([part]), in_loss_N=np.array([span.in_loss], np.uint8)))
                continue
            if not pieces or not pieces[-1].spans:
                pieces.append(_Piece(continuation=bool(pieces)))
            pieces[-1].spans.append(Span(text=part, in_loss=span.in_loss))
    return pieces


def _encode_partly_in_loss(tokenizer: Tokenizer, piece: _Piece) -> None:
    """Encodes a text of which only some spans are in the loss, by comparing the bytes of tokens and spans."""
    ids, bytes_N2 = tokenizer.encode_with_byte_spans(piece.text, continuation=piece.continuation)
    start_N, end_N = bytes_N2.T
    byte_in_loss = np.repeat(
        [span.in_loss > 0 for span in piece.spans], [len(span.text.encode()) for span in piece.spans]
    )
    # A token spans at least one byte here, because some libraries report spaces as empty ranges.
    end_N = np.clip(np.maximum(end_N, start_N + 1), None, len(byte_in_loss))
    # Bytes [0, 0, 1, 1] have num_before [0, 0, 0, 1, 2]. It grows between start and end of a token that is in the loss.
    num_before = np.concatenate([[0], np.cumsum(byte_in_loss)])
    piece.ids_N = np.array(ids, np.int64)
    in_loss = max(span.in_loss for span in piece.spans)
    piece.in_loss_N = np.where(num_before[end_N] > num_before[start_N], in_loss, 0).astype(np.uint8)
