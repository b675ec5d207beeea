"""Formats stores and batches as lines of text."""

from collections.abc import Iterator, Mapping
from itertools import pairwise

import numpy as np

from jaxinfra.data.interfaces import Batch
from jaxinfra.data.store.manifest import SPLITS, Manifest
from jaxinfra.data.store.store import LABELS, OFFSETS, Store, TokenStore
from jaxinfra.data.tokenizer import Tokenizer

_DOCUMENT_SEPARATOR = " ⏎ "
_BAR_WIDTH = 40


def describe_manifest(manifest: Manifest) -> Iterator[str]:
    """Yields the contents of a version, and the baselines to beat."""
    yield f"fingerprint  {manifest.fingerprint}"
    yield f"created      {manifest.created} by {', '.join(f'{n} {v}' for n, v in manifest.versions.items())}"
    if manifest.tokenizer is not None:
        tokenizer, train = manifest.tokenizer, manifest.splits["train"]
        yield (
            f"tokenizer    {tokenizer.kind}, {tokenizer.vocab_size:,} tokens, {train.bytes / max(1, train.tokens):.2f} "
            f"bytes a token, {tokenizer.end_of_document} ends documents"
        )
    counts = manifest.counts
    left_out = {"skipped": counts.skipped, **counts.filtered, "duplicates": counts.duplicates}
    reasons = ", ".join(f"{count:,} {name}" for name, count in left_out.items() if count)
    yield f"records      {counts.records:,} read{f'; left out: {reasons}' if reasons else ''}"
    what = "images" if manifest.kind == "images" else "documents"
    dropped = f"; {counts.overlap_dropped:,} training {what} dropped for it" if counts.overlap_dropped else ""
    yield f"overlap      {counts.overlap:,} of the validation {what} are in the training source too{dropped}"
    for split in SPLITS:
        info = manifest.splits[split]
        tokens = f"{info.tokens:,} tokens, " if manifest.tokenizer else ""
        yield f"{split:<11}  {info.documents:,} {what}, {tokens}{info.bytes:,} bytes"
    for name, pack in manifest.packs.items():
        yield (f"packed       {name}: {pack.rows:,} rows, {pack.efficiency:.1%} full, {pack.truncated:,} documents cut")
    for metric, values in manifest.baselines.items():
        yield f"to beat      {', '.join(f'{value:.4f} by {name}' for name, value in values.items())} ({metric})"


def length_histogram(store: TokenStore) -> Iterator[str]:
    """Yields a histogram of document lengths, in powers of two."""
    for split in SPLITS:
        lengths = store.lengths(split)
        if len(lengths):
            yield f"{split}: tokens of a document"
            power_D = np.floor(np.log2(lengths)).astype(int)
            counts = list(enumerate(np.bincount(power_D).tolist()))[power_D.min() :]
            yield from _bars({f"{2**p:>10,} to {2 ** (p + 1) - 1:>10,}": count for p, count in counts})


def label_histogram(store: Store) -> Iterator[str]:
    """Yields a histogram of image classes."""
    names = store.manifest.labels
    for split in SPLITS:
        yield f"{split}: images of a class"
        count_C = np.bincount(store.read_all(split, LABELS), minlength=len(names))
        yield from _bars({f"{names[c] if names else c:>10}": int(count) for c, count in enumerate(count_C)})


def _bars(counts: Mapping[str, int]) -> Iterator[str]:
    largest = max(counts.values())
    for name, count in counts.items():
        yield f"{name} {count:>10,} {'█' * -(-_BAR_WIDTH * count // largest)}".rstrip()


def sample_documents(store: TokenStore, documents: int, chars: int) -> Iterator[str]:
    """Yields some evenly spaced documents of each split, cut to `chars`; text outside the loss is in brackets."""
    for split in SPLITS:
        count = store.manifest.splits[split].documents
        for number in np.linspace(0, count - 1, min(documents, count)).astype(int):
            bounds = store.read_ranges(split, OFFSETS, np.array([number]), np.array([2]))
            start, length = bounds[:1], int(bounds[1] - bounds[0])
            shown = min(length, 4 * chars + 1)  # tokens; UTF-8 has at most 4 bytes a character, tokens at least one
            tokens, mask = store.read(split, start, shown)[0], store.read_mask(split, start, shown)
            yield f"{split} document {number}, {length} tokens"
            yield _cut(_format_tokens(store.tokenizer, tokens, None if mask is None else mask[0]), chars)


def format_token_rows(batch: Batch, tokenizer: Tokenizer, ids: np.ndarray, first_row: int, chars: int) -> Iterator[str]:
    """Yields the rows of a batch as text, document by document; targets with weight 0 are in brackets.

    The batch has `inputs`, `targets`, and maybe `segments` and `weights`, [rows, T]. `ids` are the sample ids of its
    rows, `first_row` is the number of the first row in the global batch, and `chars` limits the text of each row.
    """
    ones = np.ones_like(batch["targets"])
    rows = zip(batch["inputs"], batch["targets"], batch.get("segments", ones), batch.get("weights", ones), strict=True)
    for row, (sample, (inputs, targets, segments, weights)) in enumerate(zip(ids, rows, strict=True), first_row):
        numbers = np.unique(segments[segments > 0])  # 0 is padding
        num_counted = int((weights > 0).sum())
        yield f"row {row}: sample {sample}, {len(numbers)} documents, {num_counted} of {len(targets)} targets count"
        texts = []
        for number in numbers:
            own = segments == number
            tokens = np.concatenate([inputs[own][:1], targets[own]])  # the first token is no target
            texts.append(_format_tokens(tokenizer, tokens, np.concatenate([[0], weights[own] > 0]).astype(np.uint8)))
        yield _cut(_DOCUMENT_SEPARATOR.join(texts), chars)


def _format_tokens(tokenizer: Tokenizer, tokens: np.ndarray, mask: np.ndarray | None) -> str:
    """Decodes tokens into one line, special ones too; runs with mask 0 are in brackets."""
    if mask is None:
        return _decode(tokenizer, tokens)
    runs = [(mask[start], _decode(tokenizer, tokens[start:end])) for start, end in _runs(np.diff(mask))]
    return "".join(text if in_loss else f"[{text}]" for in_loss, text in runs)


def _decode(tokenizer: Tokenizer, tokens: np.ndarray) -> str:
    special = {index: text for text, index in tokenizer.special_tokens.items()}
    special_N = np.isin(tokens, [*special])
    # Every special token is a run of its own, because `decode` leaves special tokens out.
    runs = (tokens[start:end].tolist() for start, end in _runs(special_N[1:] | special_N[:-1]))
    return "".join(special.get(run[0]) or repr(tokenizer.decode(run))[1:-1] for run in runs)


def _runs(changes: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yields start and end of each run of tokens; `changes[i]` says whether a run ends between tokens i and i + 1."""
    return pairwise([0, *(np.flatnonzero(changes) + 1).tolist(), len(changes) + 1])


def _cut(text: str, chars: int) -> str:
    return text if len(text) <= chars else text[:chars] + " ..."
