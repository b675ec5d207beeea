"""What the recipes of all kinds of stores have: where records are, and where the store goes.

What is made of a record, and what is validation data, `corpus` and `image_set` say.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

from jaxinfra.config import Problem
from jaxinfra.config.limits import NonEmpty
from jaxinfra.prepare.sources.any_source import AnySource

SHARD_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class StoreRecipe:
    """How a store is made, whatever it holds.

    Attributes:
        store: folder or URL (`s3://`, `gs://`) of the store; its versions stand in it beside one another.
        source: where the records are.
        on_overlap: what documents do that are in the validation and in the training split: be counted and kept, be left
            out of training, or end the work. They are kept by default, because short documents (empty files, thanks,
            licenses) repeat in almost every corpus, and the count tells whether there is more to it.
        on_bad: what a record does that cannot be used: end the work, or be left out, counted and listed.
        baselines: whether to measure what simple models reach on what is held out: how well they know a text, how often
            the nearest training image is of the right class (for small sets).
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
