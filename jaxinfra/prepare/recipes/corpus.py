"""Recipes for stores of text and of labeled images: where records come from, and how they are processed."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Literal, override

from annotated_types import Ge

from jaxinfra.config import Problem
from jaxinfra.config.limits import NonEmptyStr
from jaxinfra.data.packing import PackSpec
from jaxinfra.prepare.documents.dedup import Dedup
from jaxinfra.prepare.documents.document import Text
from jaxinfra.prepare.documents.filters import Filter, Filters
from jaxinfra.prepare.documents.formats import AnyFormat
from jaxinfra.prepare.recipes.validation import AnyValidation, ByKey, ImageValidation, OtherStore
from jaxinfra.prepare.sources.any_source import AnySource
from jaxinfra.prepare.sources.stream import StreamSource
from jaxinfra.prepare.tokenizers import AnyTokenizer, TrainBpe

SHARD_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class StoreRecipe:
    """Fields of all recipes.

    Attributes:
        store: folder or URL (`s3://`, `gs://`), which holds the versions.
        source: where the records come from.
        on_overlap: "fail" makes documents that are in both splits an error, "drop" drops them from training, "keep"
            keeps them; they are counted. The default keeps them, because short documents (empty files, licenses)
            repeat in almost every corpus.
        on_bad: "fail" makes a bad record an error, "skip" skips it; skipped records are counted and listed.
        baselines: whether to measure simple models on the validation split: compression and n-grams, or the nearest
            training image (small sets only).
        shard_bytes: bytes of the source that a job reads.
        work_dir: folder of unfinished work, which all workers can reach. None is in the store, or in the user's cache
            if the store is remote.
    """

    store: NonEmptyStr
    source: AnySource
    on_overlap: Literal["fail", "drop", "keep"] = "keep"
    on_bad: Literal["fail", "skip"] = "fail"
    baselines: bool = False
    shard_bytes: Annotated[int, Ge(1024)] = SHARD_BYTES
    work_dir: NonEmptyStr | None = None

    def problems(self) -> Iterable[Problem]:
        """Yields what is wrong with the fields; reads no files."""
        if "://" in (self.work_dir or ""):
            yield Problem(fields=("work_dir",), message="must be a local folder", fix="use work_dir=PATH")


@dataclass(frozen=True, kw_only=True)
class Corpus(StoreRecipe):
    """Makes a store of text, or of pairs of texts.

    Attributes:
        validation: where the validation split comes from: a fraction of the source, another source, or another store.
        format: how records become documents, and what of them counts in the loss.
        filters: rules that a document must pass; those that do not are left out.
        dedup: which repeated documents to leave out; None keeps them.
        tokenizer: how text becomes tokens.
        packs: packings of whole documents into rows, for runs with `packing=best_fit`.
    """

    validation: AnyValidation = ByKey()
    format: AnyFormat = Text()
    filters: Filters | Filter = Filters()
    dedup: Dedup | None = None
    tokenizer: AnyTokenizer = field(default_factory=TrainBpe)
    packs: tuple[PackSpec, ...] = ()

    @override
    def problems(self) -> Iterable[Problem]:
        yield from super().problems()
        is_stream, trains = isinstance(self.source, StreamSource), isinstance(self.tokenizer, TrainBpe)
        other_store, pairs = isinstance(self.validation, OtherStore), self.format.kind != "text"
        if is_stream and trains:
            fix = "use tokenizer=tokenizer_file tokenizer.path=PATH, or tokenizer=bytes"
            yield Problem(fields=("source", "tokenizer"), message="a stream cannot train a tokenizer", fix=fix)
        if is_stream and not isinstance(self.validation, ByKey):
            message = "a stream can only be split by key"
            yield Problem(fields=("source", "validation"), message=message, fix="use validation=by_key")
        if other_store and trains:
            message = "the other store has its own tokenizer, so this one cannot be trained"
            fix = "use tokenizer=tokenizer_file tokenizer.path=PATH, the tokenizer.json of that store"
            yield Problem(fields=("validation", "tokenizer"), message=message, fix=fix)
        if other_store and self.dedup and (self.format.has_loss_mask or pairs):
            message = "duplicates of another store are found for format=text only"
            yield Problem(fields=("validation", "dedup"), message=message, fix="use dedup=none")
        if self.packs and pairs:
            yield Problem(
                fields=("packs", "format"), message="pairs and labeled completions cannot be packed", fix="use packs=()"
            )
        if self.baselines and pairs:
            message = "pairs and labeled completions have no baselines"
            yield Problem(fields=("baselines", "format"), message=message, fix="use baselines=false")
        names = [pack.name for pack in self.packs]
        if len(set(names)) < len(names):
            yield Problem(fields=("packs",), message="two are equal", fix="name each once")


@dataclass(frozen=True, kw_only=True)
class ImageSet(StoreRecipe):
    """Makes a store of images, which must all have the same shape.

    Attributes:
        validation: where the validation split comes from: a fraction of the source, or another source.
        image: field of the image: uint8[height, width, channels] or [height, width], or lists.
        label: field of the class, a number from 0.
        classes: names of the classes by number; () if they have none.
    """

    validation: ImageValidation = ByKey()
    image: NonEmptyStr = "image"
    label: NonEmptyStr = "label"
    classes: tuple[str, ...] = ()
