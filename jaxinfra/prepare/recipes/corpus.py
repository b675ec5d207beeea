"""The recipe of a token store, as a config file describes it: where its text is from and what is done to it."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from jaxinfra.config import Problem
from jaxinfra.data.packing import Pack
from jaxinfra.data.tokenizer import AnyTokenizer, TrainBpe
from jaxinfra.prepare.documents.dedup import Dedup
from jaxinfra.prepare.documents.document import Text
from jaxinfra.prepare.documents.filters import Filters
from jaxinfra.prepare.documents.forms import AnyForm
from jaxinfra.prepare.recipes.store_recipe import StoreRecipe
from jaxinfra.prepare.sources.stream import Stream


@dataclass(frozen=True, kw_only=True)
class Corpus(StoreRecipe):
    """How a store of text, or of pairs of texts, is made.

    Attributes:
        form: how a record becomes a document.
        filters: which documents are good enough.
        dedup: which documents are left out because they repeat another; None keeps all.
        tokenizer: what makes tokens of text.
        packs: rows that whole documents are packed into, for runs that ask for it.
    """

    form: AnyForm = Text()
    filters: Filters = Filters()
    dedup: Dedup | None = None
    tokenizer: AnyTokenizer = field(default_factory=TrainBpe)
    packs: tuple[Pack, ...] = ()

    def problems(self) -> Iterable[Problem]:
        """Yields what is wrong with the recipe itself; nothing is looked up."""
        yield from super().problems()
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


def draw(key: str) -> float:
    """A number in [0, 1) that the key fixes: it decides the split, and what trains the tokenizer."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64
