"""The recipe of a token store, as a config file describes it: where its text is from and what is done to it."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from jaxinfra.config import Problem
from jaxinfra.data.documents.dedup import Dedup
from jaxinfra.data.documents.document import Text
from jaxinfra.data.documents.filters import Filters
from jaxinfra.data.documents.forms import AnyForm
from jaxinfra.data.packing import Pack
from jaxinfra.data.records.sources import AnySource
from jaxinfra.data.records.stream import Stream
from jaxinfra.data.tokenizer import AnyTokenizer, TrainBpe

SHARD_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """How a store is made.

    Attributes:
        store: folder or URL (`s3://`, `gs://`) of the store; its versions stand in it beside one another.
        source: where the records are.
        form: how a record becomes a document.
        filters: which documents are good enough.
        dedup: which documents are left out because they repeat another; None keeps all.
        tokenizer: what makes tokens of text.
        heldout_fraction: expected share of the records that is never trained on, above 0 and below 1. Whether a record
            is depends on its key alone, so that others may come and go.
        on_bad: what a record does that cannot be read: end the work, or be left out, counted and listed.
        packs: rows that whole documents are packed into, for runs that ask for it.
        baselines: whether to measure how well simple models know the held-out text.
        shard_bytes: of the source, read by a worker at a time.
        work: folder for what is in the making, which all workers must see; None is a hidden one in the store, or in
            the user's cache where the store is remote.
    """

    store: str
    source: AnySource
    form: AnyForm = Text()
    filters: Filters = Filters()
    dedup: Dedup | None = None
    tokenizer: AnyTokenizer = field(default_factory=TrainBpe)
    heldout_fraction: float = 0.05
    on_bad: Literal["fail", "skip"] = "fail"
    packs: tuple[Pack, ...] = ()
    baselines: bool = False
    shard_bytes: int = SHARD_BYTES
    work: str | None = None

    def problems(self) -> Iterable[Problem]:
        """Yields what is wrong with the recipe itself; nothing is looked up."""
        yield from common_problems(self.store, self.heldout_fraction, self.shard_bytes, self.work)
        if isinstance(self.source, Stream) and isinstance(self.tokenizer, TrainBpe):
            fix = "use tokenizer=tokenizer_file tokenizer.path=PATH, or tokenizer=bytes"
            yield Problem(fields=("source", "tokenizer"), message="no tokenizer is trained on a stream", fix=fix)
        if self.packs and self.form.group > 1:
            yield Problem(fields=("packs", "form"), message="pairs are not packed", fix="use packs=()")
        if self.baselines and self.form.group > 1:
            yield Problem(fields=("baselines", "form"), message="pairs have none", fix="use baselines=false")
        names = [pack.name for pack in self.packs]
        if len(set(names)) < len(names):
            yield Problem(fields=("packs",), message="two are alike", fix="name each once")


def common_problems(store: str, heldout_fraction: float, shard_bytes: int, work: str | None) -> Iterable[Problem]:
    """What may be wrong with the fields that all recipes have."""
    if not store:
        yield Problem(fields=("store",), message="names no folder", fix="use store=stores/NAME")
    if not 0 < heldout_fraction < 1:
        yield Problem(
            fields=("heldout_fraction",),
            message="must be above 0 and below 1: both splits are needed",
            fix="use heldout_fraction=0.05",
        )
    if shard_bytes < 1024:
        yield Problem(fields=("shard_bytes",), message="must be at least 1024", fix=f"use shard_bytes={SHARD_BYTES}")
    if work is not None and (not work or "://" in work):
        yield Problem(fields=("work",), message="names no folder of this machine", fix="use work=PATH")


def draw(key: str) -> float:
    """A number in [0, 1) that the key fixes: it decides the split, and what trains the tokenizer."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64
