"""Formats what a store holds as lines of text: counts, baselines, histograms.

Shape suffix: D documents.
"""

import shlex
from collections.abc import Iterator, Mapping
from importlib.util import find_spec

import numpy as np

from jaxinfra.command import command_line
from jaxinfra.data.store.layout import LABELS, LENGTHS
from jaxinfra.data.store.manifest import SPLITS, Manifest
from jaxinfra.data.store.store import Store, TokenStore
from jaxinfra.packages import install_command
from jaxinfra.track.formatting import format_metric

_FEW = 2  # documents, such as the two parts of one long file: none is a copy
_MUCH_REPEATED = 0.1  # of the validation text; less is usual, as code and licenses repeat lines
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
        listed = ", ".join(f"{format_metric(value)} by {name}" for name, value in values.items())
        yield f"to beat      {listed} ({metric})"
    if counts.repeated >= _MUCH_REPEATED:
        yield f"repeated     {_repeated(manifest)}"


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


def _repeated(manifest: Manifest) -> str:
    """Says how much of the validation text is in the training text, and what helps: a command against copies."""
    share, dedup = manifest.counts.repeated, manifest.recipe.get("dedup")
    line = f"{share:.0%} of the validation text is in the training text too, so losses are better than on new text"
    general = "remove from the source what it repeats, such as a license, or use validation=SOURCE of other text"
    is_near = isinstance(dedup, Mapping) and dedup.get("near")
    if is_near or sum(split.documents for split in manifest.splits.values()) <= _FEW:
        return f"{line}; {general}"
    exact = dedup is None and manifest.counts.overlap
    overrides = ["dedup=dedup"] if exact else ["dedup=dedup", "dedup.near=true"]
    fix = f"prepare it again with {' '.join(overrides)}"
    if words := shlex.split(manifest.prepared_from):
        fix = command_line("data", "prepare", *words, *(each for each in overrides if each not in words))
    install = "" if exact or find_spec("datasketch") else f"{install_command('jaxinfra[dedup]')}, then "
    return f"{line}; {general}; against {'' if exact else 'near '}copies of whole documents: {install}{fix}"


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
