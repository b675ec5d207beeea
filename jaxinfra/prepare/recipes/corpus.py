"""The recipe of a token store, as a config file describes it: where its text is from and what is done to it."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge

from jaxinfra.config import Problem
from jaxinfra.config.limits import NonEmpty
from jaxinfra.data.packing import PackSpec
from jaxinfra.prepare.documents.dedup import Dedup
from jaxinfra.prepare.documents.document import Text
from jaxinfra.prepare.documents.filters import Filters
from jaxinfra.prepare.documents.forms import AnyForm
from jaxinfra.prepare.recipes.validation import AnyValidation, ByKey, OtherStore
from jaxinfra.prepare.sources.any_source import AnySource
from jaxinfra.prepare.sources.stream import Stream
from jaxinfra.prepare.tokenizers import AnyTokenizer, TrainBpe

SHARD_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class StoreRecipe:
    """Describes how a store of any kind is made.

    Attributes:
        store: folder or URL (`s3://`, `gs://`) of the store; its versions stand in it beside one another.
        source: where the records are.
        on_overlap: what documents do that are in the validation and in the training split: be counted and kept, be left
            out of training, or end the work. They are kept by default, because short documents (empty files, thanks,
            licenses) repeat in almost every corpus, and the count tells whether there is more to it.
        on_bad: what a record does that cannot be used: end the work, or be left out, counted and listed.
        baselines: whether to measure simple models on the validation split: bits per byte of text, accuracy of the
            nearest neighbor of images (for small sets).
        shard_bytes: of the source, read by a worker at a time.
        work: folder for what is in the making, which all workers must see; None is a hidden one in the store, or in
            the user's cache where the store is remote.
    """

    store: NonEmpty
    source: AnySource
    on_overlap: Literal["fail", "drop", "keep"] = "keep"
    on_bad: Literal["fail", "skip"] = "fail"
    baselines: bool = False
    shard_bytes: Annotated[int, Ge(1024)] = SHARD_BYTES
    work: NonEmpty | None = None

    def problems(self) -> Iterable[Problem]:
        """Yields what is wrong with the recipe itself; nothing is looked up."""
        if "://" in (self.work or ""):
            yield Problem(fields=("work",), message="names no folder of this machine", fix="use work=PATH")


@dataclass(frozen=True, kw_only=True)
class Corpus(StoreRecipe):
    """How a store of text, or of pairs of texts, is made.

    Attributes:
        dedup: which documents are left out because they repeat another; None keeps all.
        packs: rows that whole documents are packed into, for runs that ask for it.
    """

    validation: AnyValidation = ByKey()
    form: AnyForm = Text()
    filters: Filters = Filters()
    dedup: Dedup | None = None
    tokenizer: AnyTokenizer = field(default_factory=TrainBpe)
    packs: tuple[PackSpec, ...] = ()

    def problems(self) -> Iterable[Problem]:
        """Yields what is wrong with the recipe itself; nothing is looked up."""
        yield from super().problems()
        streams, trains = isinstance(self.source, Stream), isinstance(self.tokenizer, TrainBpe)
        if streams and trains:
            fix = "use tokenizer=tokenizer_file tokenizer.path=PATH, or tokenizer=bytes"
            yield Problem(fields=("source", "tokenizer"), message="no tokenizer is trained on a stream", fix=fix)
        if streams and not isinstance(self.validation, ByKey):
            message = "a stream is split by the keys of its records alone"
            yield Problem(fields=("source", "validation"), message=message, fix="use validation=by_key")
        if isinstance(self.validation, OtherStore) and trains:
            message = "a tokenizer that is trained for this store is not that of another one"
            fix = "use tokenizer=tokenizer_file tokenizer.path=PATH, the tokenizer.json of that store"
            yield Problem(fields=("validation", "tokenizer"), message=message, fix=fix)
        if isinstance(self.validation, OtherStore) and self.dedup and (self.form.masked or self.form.group > 1):
            message = "duplicates of another store are found among plain texts alone"
            yield Problem(fields=("validation", "dedup"), message=message, fix="use dedup=none")
        if self.packs and self.form.group > 1:
            yield Problem(fields=("packs", "form"), message="pairs are not packed", fix="use packs=()")
        if self.baselines and self.form.group > 1:
            yield Problem(fields=("baselines", "form"), message="pairs have none", fix="use baselines=false")
        names = [pack.name for pack in self.packs]
        if len(set(names)) < len(names):
            yield Problem(fields=("packs",), message="two are alike", fix="name each once")
