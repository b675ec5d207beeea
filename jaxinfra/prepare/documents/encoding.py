"""Encodes documents to token ids, and marks the tokens that count in the loss.

The text between two special tokens is encoded as a whole, as when the model is used. So a token may reach across spans;
it counts in the loss if any of its text does.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jaxinfra.data.tokenizer import Tokenizer
from jaxinfra.prepare.documents.document import Document, Span


@dataclass(frozen=True, kw_only=True)
class EncodedDocument:
    """Tokens of a document without the end-of-document token."""

    ids_N: np.ndarray  # int64
    in_loss_N: np.ndarray  # bool
    num_bytes: int  # of the text in UTF-8


@dataclass(frozen=True, eq=False)
class _TextRun:
    """Spans without special tokens between them."""

    spans: Sequence[Span]
    continuation: bool  # whether a special token comes before the run in its document

    @property
    def text(self) -> str:
        return "".join(span.text for span in self.spans)

    @property
    def mixed(self) -> bool:  # whether only a part is in the loss
        return len({span.in_loss for span in self.spans}) > 1


def encode_documents(tokenizer: Tokenizer, documents: Sequence[Document]) -> list[EncodedDocument]:
    """Encodes documents in large batches, which the tokenizer spreads over its threads."""
    split = [list(_split_at_special_tokens(tokenizer, document)) for document in documents]
    runs = [part for parts in split for part in parts if isinstance(part, _TextRun)]
    encoded = {run: _encode_mixed(tokenizer, run) for run in runs if run.mixed}
    for continuation in (False, True):
        batch = [run for run in runs if run.continuation == continuation and not run.mixed]
        ids_of_runs = tokenizer.encode_batch([run.text for run in batch], continuation=continuation)
        for run, ids in zip(batch, ids_of_runs, strict=True):
            encoded[run] = _encoded(ids, np.full(len(ids), run.spans[0].in_loss), len(run.text.encode()))
    return [_concatenate([encoded[part] if isinstance(part, _TextRun) else part for part in parts]) for parts in split]


def _encoded(ids: Sequence[int], in_loss: Sequence[bool] | np.ndarray, num_bytes: int) -> EncodedDocument:
    return EncodedDocument(ids_N=np.array(ids, np.int64), in_loss_N=np.array(in_loss, bool), num_bytes=num_bytes)


def _split_at_special_tokens(tokenizer: Tokenizer, document: Document) -> Iterator[_TextRun | EncodedDocument]:
    """Yields the special tokens of a document, encoded, and the runs of text between them."""
    spans: list[Span] = []
    continuation = False
    for span in document:
        for part in tokenizer.split(span.text) if span.from_template else [span.text]:
            if isinstance(part, str):
                spans.append(Span(text=part, in_loss=span.in_loss))
                continue
            if spans:
                yield _TextRun(spans, continuation)
            yield _encoded([part], [span.in_loss], 0)
            spans, continuation = [], True
    if spans:
        yield _TextRun(spans, continuation)


def _encode_mixed(tokenizer: Tokenizer, run: _TextRun) -> EncodedDocument:
    """Encodes a run of which only a part is in the loss."""
    ids, bytes_N2 = tokenizer.encode_with_byte_spans(run.text, continuation=run.continuation)
    sizes = [len(span.text.encode()) for span in run.spans]
    byte_in_loss = np.repeat([span.in_loss for span in run.spans], sizes)
    count_before = np.concatenate([[0], np.cumsum(byte_in_loss)])  # bytes in the loss before each byte
    first_N, end_N = bytes_N2.T
    # A token spans at least one byte here, because some libraries report spaces as empty ranges.
    end_N = np.clip(np.maximum(end_N, first_N + 1), None, len(byte_in_loss))
    return _encoded(ids, count_before[end_N] > count_before[first_N], len(byte_in_loss))


def _concatenate(parts: Sequence[EncodedDocument]) -> EncodedDocument:
    return EncodedDocument(
        ids_N=np.concatenate([np.empty(0, np.int64), *(part.ids_N for part in parts)]),
        in_loss_N=np.concatenate([np.empty(0, bool), *(part.in_loss_N for part in parts)]),
        num_bytes=sum(part.num_bytes for part in parts),
    )
