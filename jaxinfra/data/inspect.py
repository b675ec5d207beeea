"""What a store holds and what a batch says, in lines for people."""

from collections.abc import Iterator, Mapping
from itertools import pairwise

import numpy as np

from jaxinfra.data.interfaces import Batch
from jaxinfra.data.store.manifest import SPLITS, Manifest
from jaxinfra.data.store.store import LABELS, Store, TokenStore
from jaxinfra.data.tokenizer import Tokenizer

BORDER = "⏎"  # stands between documents
_BARS = 40


def describe_manifest(manifest: Manifest) -> Iterator[str]:
    """What a version holds and what there is to beat."""
    yield f"fingerprint  {manifest.fingerprint}"
    yield f"made         {manifest.created} by {', '.join(f'{n} {v}' for n, v in manifest.versions.items())}"
    if manifest.tokenizer is not None:
        tokenizer = manifest.tokenizer
        yield (
            f"tokenizer    {tokenizer.kind}, {tokenizer.vocab_size:,} words, {manifest.bytes_per_token('train'):.2f} "
            f"bytes a token, {tokenizer.end_of_document} ends documents"
        )
    counts = manifest.counts
    left_out = {"skipped": counts.skipped, **counts.filtered, "duplicates": counts.duplicates}
    shown = ", ".join(f"{count:,} {name}" for name, count in left_out.items() if count)
    yield f"records      {counts.records:,} read{f'; left out: {shown}' if shown else ''}"
    what = "images" if manifest.kind == "images" else "documents"
    dropped = f", which {counts.overlap_dropped:,} training {what} were left out for" if counts.overlap_dropped else ""
    yield f"overlap      {counts.overlap:,} of the validation {what} are in the training source too{dropped}"
    for split in SPLITS:
        info = manifest.splits[split]
        tokens = f"{info.tokens:,} tokens, " if manifest.tokenizer else ""
        yield f"{split:<11}  {info.documents:,} {what}, {tokens}{info.bytes:,} bytes"
    for name, pack in manifest.packs.items():
        yield (
            f"packed       {name}: {pack.rows:,} rows, {pack.efficiency:.1%} of their places used, {pack.truncated:,} "
            "documents cut"
        )
    for score, by in manifest.baselines.items():
        yield f"to beat      {', '.join(f'{value:.4f} by {name}' for name, value in by.items())} ({score})"


def length_histogram(store: TokenStore) -> Iterator[str]:
    """How long documents are, in powers of two."""
    for split in SPLITS:
        lengths = store.lengths(split)
        if len(lengths):
            yield f"{split}: tokens of a document"
            count_P = np.bincount(np.floor(np.log2(lengths)).astype(int))
            first = int(np.flatnonzero(count_P)[0])
            named = enumerate(count_P[first:].tolist(), first)
            yield from _bars({f"{2**p:>10,} to {2 ** (p + 1) - 1:>10,}": count for p, count in named})


def label_histogram(store: Store) -> Iterator[str]:
    """How many images are of which class."""
    names = store.manifest.labels
    for split in SPLITS:
        yield f"{split}: images of a class"
        count_C = np.bincount(store.read_all(split, LABELS), minlength=len(names))
        yield from _bars({f"{names[c] if names else c:>10}": int(count) for c, count in enumerate(count_C)})


def _bars(counts: Mapping[str, int]) -> Iterator[str]:
    largest = max(counts.values())
    for name, count in counts.items():
        yield f"{name} {count:>10,} {'█' * -(-_BARS * count // largest)}".rstrip()


def sample_documents(store: TokenStore, documents: int, chars: int) -> Iterator[str]:
    """Some documents of each split, evenly spaced, each with its end; what is not learned is in brackets.

    Documents have one token at least, their end.
    """
    for split in SPLITS:
        info = store.manifest.splits[split]
        for number in np.linspace(0, info.documents - 1, min(documents, info.documents)).astype(int):
            borders = store.read_ranges(split, "offsets", np.array([number]), np.array([2]))
            start, length = borders[:1], int(borders[1] - borders[0])
            shown = min(length, 4 * chars + 1)
            tokens, mask = store.read(split, start, shown)[0], store.read_mask(split, start, shown)
            yield f"{split} document {number}, {length} tokens"
            yield _cut(spelt(store.tokenizer, tokens, None if mask is None else mask[0]), chars)


def rows(batch: Batch, tokenizer: Tokenizer, ids: np.ndarray, first_row: int, chars: int) -> Iterator[str]:
    """The rows of a batch as text, document by document; targets that are not learned are in brackets.

    The batch has `inputs`, `targets`, and `segments` and `weights` where there are any, [rows, T]; `ids` are the
    samples of its rows, the first of which is `first_row` of the global batch. Of each row `chars` of text are shown.
    """
    for at, sample in enumerate(ids):
        targets, weights = batch["targets"][at], batch.get("weights", np.ones_like(batch["targets"]))[at]
        segments = batch.get("segments", np.ones_like(batch["targets"]))[at]
        used = segments > 0
        documents = len(np.unique(segments[used]))
        learned = int((weights > 0).sum())
        yield f"row {first_row + at}: sample {sample}, {documents} documents, {learned} of {len(targets)} targets count"
        parts = []
        for segment in np.unique(segments[used]):
            own = segments == segment
            ids_of = np.concatenate([batch["inputs"][at][own][:1], targets[own]])
            parts.append(spelt(tokenizer, ids_of, np.concatenate([[0], weights[own] > 0]).astype(np.uint8)))
        yield _cut(f" {BORDER} ".join(parts), chars)


def spelt(tokenizer: Tokenizer, tokens: np.ndarray, mask: np.ndarray | None) -> str:
    """Tokens as text in one line, special ones too; runs that are not learned stand in brackets."""
    if mask is None:
        return _text(tokenizer, tokens)
    runs = [(mask[a], _text(tokenizer, tokens[a:b])) for a, b in _runs(np.diff(mask))]
    return "".join(text if learned else f"[{text}]" for learned, text in runs)


def _text(tokenizer: Tokenizer, tokens: np.ndarray) -> str:
    special = {index: text for text, index in tokenizer.special_tokens.items()}
    special_N = np.isin(tokens, [*special])
    runs = (tokens[a:b].tolist() for a, b in _runs(special_N[1:] | special_N[:-1]))
    return "".join(special.get(run[0]) or repr(tokenizer.decode(run))[1:-1] for run in runs)


def _runs(changes: np.ndarray) -> Iterator[tuple[int, int]]:
    """Where runs of tokens begin and end, by what changes between neighbors."""
    return pairwise([0, *(np.flatnonzero(changes) + 1).tolist(), len(changes) + 1])


def _cut(text: str, chars: int) -> str:
    return text if len(text) <= chars else text[:chars] + " ..."
