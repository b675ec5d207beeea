"""Formats documents and batches of tokens as lines of text.

Shape suffixes: B rows of a batch, T positions.
"""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from itertools import groupby

import numpy as np

from jaxinfra.data.interfaces import Batch
from jaxinfra.data.store.layout import OFFSETS
from jaxinfra.data.store.manifest import SPLITS
from jaxinfra.data.store.store import TokenStore
from jaxinfra.data.tokenizer import Tokenizer

ALWAYS_IN_COLOR = ContextVar("always_in_color", default=False)
"""Whether what counts in the loss is shown in color where the output is no terminal, too."""

_GREEN, _BRACKETS = ("\x1b[32m", "\x1b[0m"), ("[", "]")
_DOCUMENT_SEPARATOR = " ⏎ "


def sample_documents(store: TokenStore, documents: int, chars: int) -> Iterator[str]:
    """Yields some evenly spaced documents of each split, cut to `chars` (see `_format_runs`)."""
    for split in SPLITS:
        count = store.manifest.splits[split].documents
        for number in np.linspace(0, count - 1, min(documents, count)).astype(int):
            bounds = store.read_ranges(split, OFFSETS, np.array([number]), np.array([2]))
            start, length = bounds[:1], int(bounds[1] - bounds[0])
            enough = min(length, 4 * chars + 1)  # tokens; a character has up to 4 bytes in UTF-8, a token at least 1
            tokens, mask = store.read_with_mask(split, start, np.array([enough]))
            yield f"{split} document {number}, {length} tokens"
            mask = np.ones_like(tokens) if mask is None else mask
            yield _format_runs(_runs(store.tokenizer, tokens, mask), chars)


def format_token_rows(batch: Batch, tokenizer: Tokenizer, ids: np.ndarray, first_row: int, chars: int) -> Iterator[str]:
    """Yields the rows of a batch as text, document by document (see `_format_runs`).

    The batch has `inputs`, `targets`, and maybe `segments` and `weights`, [B, T]. `ids` are the sample ids of its rows,
    `first_row` is the number of the first row in the global batch, and `chars` limits the text of each row.
    """
    ones_BT = np.ones_like(batch["targets"])
    segments_BT, weights_BT = batch.get("segments", ones_BT), batch.get("weights", ones_BT)
    for i, sample in enumerate(ids):
        inputs, targets, segments, in_loss = batch["inputs"][i], batch["targets"][i], segments_BT[i], weights_BT[i] > 0
        numbers = np.unique(segments[segments > 0])  # 0 is padding
        counted = f"{in_loss.sum()} of {len(targets)} targets count"
        yield f"row {first_row + i}: sample {sample}, {len(numbers)} documents, {counted}"
        texts = []
        for number in numbers:
            own = segments == number
            tokens = np.concatenate([inputs[own][:1], targets[own]])  # the first token is no target
            texts.append([*_runs(tokenizer, tokens, np.concatenate([[False], in_loss[own]]))])
        separated = [run for text in texts for run in (*text, (_DOCUMENT_SEPARATOR, None))][:-1]
        yield _format_runs(separated, chars)


def _runs(tokenizer: Tokenizer, tokens: np.ndarray, mask: np.ndarray) -> Iterator[tuple[str, bool]]:
    """Decodes tokens into one line, special ones too; yields runs of text with whether they count in the loss."""
    for in_loss, run in groupby(range(len(tokens)), key=lambda i: mask[i] > 0):
        yield _decode(tokenizer, tokens[[*run]].tolist()), in_loss


def _format_runs(runs: Iterable[tuple[str, bool | None]], chars: int) -> str:
    """Returns the first `chars` characters; what counts in the loss is green on a terminal, the rest in brackets else.

    With `ALWAYS_IN_COLOR` it is green anywhere, with the variable NO_COLOR only then.
    """
    colors = ALWAYS_IN_COLOR.get() or (sys.stdout.isatty() and "NO_COLOR" not in os.environ)
    parts, left = list[str](), chars
    for text, in_loss in runs:
        shown = text[: max(0, left)]
        left -= len(text)
        marks = ("", "")
        if colors and in_loss:
            marks = _GREEN
        elif not colors and in_loss is False:
            marks = _BRACKETS
        parts += [shown.join(marks)] if shown else []
    return "".join(parts) + (" ..." if left < 0 else "")


def _decode(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """Decodes tokens into one line, where special tokens are shown as their texts."""
    texts = {token: text for text, token in tokenizer.special_tokens.items()}  # `decode` leaves these tokens out
    parts = []
    for is_special, run in groupby(tokens, key=texts.__contains__):
        ids = list(run)
        parts.append("".join(texts[token] for token in ids) if is_special else repr(tokenizer.decode(ids))[1:-1])
    return "".join(parts)
