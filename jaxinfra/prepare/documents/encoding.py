"""From documents to token ids, and which of them are learned.

What stands between two special tokens is tokenized as one text, whoever wrote it: so a conversation gets the tokens
that its template would give it when the model is used, except that no message spells a special token. A token is
learned if any of its text is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jaxinfra.data.tokenizer import Tokenizer
from jaxinfra.prepare.documents.document import Document, Span


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The tokens of a document, without an end: int64[N], whether each is learned: bool[N], and bytes of their text."""

    ids_N: np.ndarray
    learned_N: np.ndarray
    n_bytes: int


@dataclass(frozen=True, eq=False)
class _Run:
    """Text without special tokens, in spans, and whether something comes before it in its document."""

    spans: Sequence[Span]
    continuation: bool

    @property
    def text(self) -> str:
        return "".join(span.text for span in self.spans)

    @property
    def mixed(self) -> bool:
        return len({span.learned for span in self.spans}) > 1


def encode_documents(tokenizer: Tokenizer, documents: Sequence[Document]) -> list[Tokens]:
    """Tokenizes documents together, on as many threads as the tokenizer takes."""
    cut = [list(_cut(tokenizer, document)) for document in documents]
    runs = [part for parts in cut for part in parts if isinstance(part, _Run)]
    encoded = {run: _encode_mixed(tokenizer, run) for run in runs if run.mixed}
    for continuation in (False, True):  # what is learned throughout, or not at all, is done together
        whole = [run for run in runs if run.continuation == continuation and not run.mixed]
        for run, ids in zip(
            whole, tokenizer.encode_batch([run.text for run in whole], continuation=continuation), strict=True
        ):
            encoded[run] = _tokens(ids, np.full(len(ids), run.spans[0].learned), len(run.text.encode()))
    return [_joined([encoded[part] if isinstance(part, _Run) else part for part in parts]) for parts in cut]


def _tokens(ids: Sequence[int], learned: Sequence[bool] | np.ndarray, n_bytes: int) -> Tokens:
    return Tokens(ids_N=np.array(ids, np.int64), learned_N=np.array(learned, bool), n_bytes=n_bytes)


def _cut(tokenizer: Tokenizer, document: Document) -> Iterator[_Run | Tokens]:
    """Yields the special tokens of a document, and the runs of text between them."""
    run: list[Span] = []
    continuation = False
    for span in document:
        for part in tokenizer.split(span.text) if span.control else [span.text]:
            if isinstance(part, str):
                run.append(Span(text=part, learned=span.learned))
                continue
            if run:
                yield _Run(run, continuation)
            yield _tokens([part], [span.learned], 0)
            run, continuation = [], True
    if run:
        yield _Run(run, continuation)


def _encode_mixed(tokenizer: Tokenizer, run: _Run) -> Tokens:
    """Tokenizes a run of which a part is learned."""
    ids, bytes_N2 = tokenizer.encode_with_byte_spans(run.text, continuation=run.continuation)
    sizes = [len(span.text.encode()) for span in run.spans]
    learned_bytes = np.repeat([span.learned for span in run.spans], sizes)
    before = np.concatenate([[0], np.cumsum(learned_bytes)])
    first_N, end_N = bytes_N2.T
    end_N = np.clip(np.maximum(end_N, first_N + 1), None, len(learned_bytes))  # some libraries give spaces no width
    return _tokens(ids, before[end_N] > before[first_N], len(learned_bytes))


def _joined(parts: Sequence[Tokens]) -> Tokens:
    return Tokens(
        ids_N=np.concatenate([np.empty(0, np.int64), *(part.ids_N for part in parts)]),
        learned_N=np.concatenate([np.empty(0, bool), *(part.learned_N for part in parts)]),
        n_bytes=sum(part.n_bytes for part in parts),
    )
