"""Formats stores and batches as lines of text.

Shape suffixes: B rows of a batch, T positions, D documents.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import numpy as np

from jaxinfra.data.interfaces import Batch
from jaxinfra.data.store.layout import LABELS, LENGTHS, OFFSETS
from jaxinfra.data.store.manifest import SPLITS, Manifest
from jaxinfra.data.store.store import Store, TokenStore
from jaxinfra.data.tokenizer import Tokenizer

_DOCUMENT_SEPARATOR = " ⏎ "
_BAR_WIDTH = 40  # characters of the longest bar


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
    yield f"records      {counts.records:,} read" + (f"; left out: {reasons}" if reasons else "")
    samples = "images" if manifest.kind == "images" else "documents"
    yield f"overlap      {_overlap(manifest, samples)}"
    for split in SPLITS:
        info = manifest.splits[split]
        tokens = f"{info.tokens:,} tokens, " if manifest.tokenizer else ""
        yield f"{split:<11}  {info.documents:,} {samples}, {tokens}{info.bytes:,} bytes"
    for name, pack in manifest.packs.items():
        yield f"packed       {name}: {pack.rows:,} rows, {pack.efficiency:.1%} full, {pack.truncated:,} documents cut"
    for metric, values in manifest.baselines.items():
        yield f"to beat      {', '.join(f'{value:.4f} by {name}' for name, value in values.items())} ({metric})"


def _overlap(manifest: Manifest, samples: str) -> str:
    """Says how many validation samples are in the training source, and what became of those there."""
    counts, total = manifest.counts, manifest.splits["validation"].documents
    if not counts.overlap:
        return f"0 of {total:,} validation {samples} are in the training source too"
    share = f" ({counts.overlap / total:.1%})" if total else ""
    line = f"{counts.overlap:,} of {total:,} validation {samples}{share} are in the training source too"
    if counts.overlap_dropped:
        return f"{line}; {counts.overlap_dropped:,} training {samples} dropped for it"
    if manifest.recipe.get("dedup") is not None:
        return f"{line}; dedup has left them out of training"
    return f"{line}; on_overlap=drop leaves them out of training"


def length_histogram(store: TokenStore) -> Iterator[str]:
    """Yields a histogram of document lengths, in powers of two."""
    for split in SPLITS:
        lengths = store.read_all(split, LENGTHS)
        if len(lengths):
            yield f"{split}: tokens of a document"
            power_D = np.floor(np.log2(lengths)).astype(int)  # 3 for 8 to 15 tokens
            counts = np.bincount(power_D).tolist()
            powers = range(power_D.min(), len(counts))
            yield from _bars({f"{2**power:>10,} to {2 ** (power + 1) - 1:>10,}": counts[power] for power in powers})


def label_histogram(store: Store) -> Iterator[str]:
    """Yields a histogram of image classes."""
    names = store.manifest.labels
    for split in SPLITS:
        yield f"{split}: images of a class"
        counts = np.bincount(store.read_all(split, LABELS), minlength=len(names)).tolist()
        yield from _bars({f"{names[label] if names else label:>10}": count for label, count in enumerate(counts)})


def _bars(counts: Mapping[str, int]) -> Iterator[str]:
    """Yields a line for each name, with a bar as long as its share of the largest count."""
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
            enough = min(length, 4 * chars + 1)  # tokens; a character has up to 4 bytes in UTF-8, a token at least 1
            tokens, mask = store.read_with_mask(split, start, np.array([enough]))
            yield f"{split} document {number}, {length} tokens"
            yield _cut(_format_tokens(store.tokenizer, tokens, np.ones_like(tokens) if mask is None else mask), chars)


def format_token_rows(batch: Batch, tokenizer: Tokenizer, ids: np.ndarray, first_row: int, chars: int) -> Iterator[str]:
    """Yields the rows of a batch as text, document by document; targets with weight 0 are in brackets.

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
            texts.append(_format_tokens(tokenizer, tokens, np.concatenate([[False], in_loss[own]])))
        yield _cut(_DOCUMENT_SEPARATOR.join(texts), chars)


def _format_tokens(tokenizer: Tokenizer, tokens: np.ndarray, mask: np.ndarray) -> str:
    """Decodes tokens into one line, special ones too; runs with mask 0 are in brackets."""
    parts = []
    for in_loss, run in groupby(range(len(tokens)), key=lambda i: mask[i] > 0):
        text = _decode(tokenizer, tokens[[*run]].tolist())
        parts.append(text if in_loss else f"[{text}]")
    return "".join(parts)


def _decode(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """Decodes tokens into one line, where special tokens are shown as their texts."""
    texts = {token: text for text, token in tokenizer.special_tokens.items()}  # `decode` leaves these tokens out
    parts = []
    for is_special, run in groupby(tokens, key=texts.__contains__):
        ids = list(run)
        parts.append("".join(texts[token] for token in ids) if is_special else repr(tokenizer.decode(ids))[1:-1])
    return "".join(parts)


def _cut(text: str, chars: int) -> str:
    return text if len(text) <= chars else text[:chars] + " ..."
