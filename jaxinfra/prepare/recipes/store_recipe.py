"""What the recipes of all kinds of stores have: where records are, where the store goes, what is held out.

What is made of a record, `corpus` and `image_set` say.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt

from jaxinfra.config import Problem
from jaxinfra.prepare.sources.any_source import AnySource

SHARD_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class StoreRecipe:
    """How a store is made, whatever it holds.

    Attributes:
        store: folder or URL (`s3://`, `gs://`) of the store; its versions stand in it beside one another.
        source: where the records are.
        heldout_fraction: expected share of the records that is never trained on, above 0 and below 1. Whether a record
            is depends on its key alone, so that others may come and go.
        on_bad: what a record does that cannot be used: end the work, or be left out, counted and listed.
        baselines: whether to measure what simple models reach on what is held out: how well they know a text, how often
            the nearest training image is of the right class (for small sets).
        shard_bytes: of the source, read by a worker at a time.
        work: folder for what is in the making, which all workers must see; None is a hidden one in the store, or in
            the user's cache where the store is remote.
    """

    store: str
    source: AnySource
    heldout_fraction: Annotated[float, Gt(0), Lt(1)] = 0.05
    on_bad: Literal["fail", "skip"] = "fail"
    baselines: bool = False
    shard_bytes: Annotated[int, Ge(1024)] = SHARD_BYTES
    work: str | None = None

    def problems(self) -> Iterable[Problem]:
        """Yields what is wrong with the recipe itself; nothing is looked up."""
        if not self.store:
            yield Problem(fields=("store",), message="names no folder", fix="use store=stores/NAME")
        if self.work is not None and (not self.work or "://" in self.work):
            yield Problem(fields=("work",), message="names no folder of this machine", fix="use work=PATH")
