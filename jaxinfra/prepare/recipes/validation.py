"""Where the validation split of a store comes from: a share of the source, another source, or another store."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt, Lt

from jaxinfra.config.limits import NonEmpty
from jaxinfra.data.store.manifest import Split, TokenizerInfo
from jaxinfra.data.store.store import TokenStore
from jaxinfra.errors import ConfigError
from jaxinfra.prepare.sources.any_source import FileSource
from jaxinfra.prepare.sources.files import FileInfo, cut
from jaxinfra.prepare.sources.record import Piece

type Fraction = Annotated[float, Gt(0), Lt(1)]
"""A share that leaves something: both splits are needed."""


@dataclass(frozen=True, kw_only=True)
class ByKey:
    """Draws whole records: whether a record is taken depends on its key alone, so that others may come and go.

    `fraction` is the expected share of the records.
    """

    fraction: Fraction = 0.05


@dataclass(frozen=True, kw_only=True)
class Tail:
    """Takes the end of the text, in the order of the source.

    `fraction` is the share of the bytes of text. A plain text is cut between two tokens, so that one long document is
    enough; of conversations and pairs whole records are taken.
    """

    fraction: Fraction = 0.05


@dataclass(frozen=True, kw_only=True)
class OtherStore:
    """Copies a split of another store, which must have the same tokenizer and the same form.

    `store` is its folder or URL, `version` a fingerprint of it or the beginning of one; None is the newest.
    """

    store: NonEmpty = ""
    version: str | None = None
    split: Split = "validation"

    def open(self, fingerprint: str | None = None) -> TokenStore:
        """Opens the store; ConfigError where there is none, or it is one of images, DataError if it is damaged."""
        return TokenStore.open(self.store, fingerprint or self.version, at="validation")

    def pieces(self, split_bytes: int) -> Sequence[Piece]:
        """Lists ranges of documents, named by the version. Raises as `open`."""
        manifest = self.open().manifest
        info, group = manifest.splits[self.split], 2 if manifest.kind == "pairs" else 1
        file = FileInfo(name=manifest.fingerprint, size_bytes=info.bytes, stamp=self.split)
        return cut([file], lambda file: info.documents // group, split_bytes)

    def require_same(self, tokenizer: TokenizerInfo, *, kind: str, masked: bool) -> None:
        """Raises ConfigError for a store whose documents another tokenizer or form made, and as `open`."""
        manifest = self.open().manifest
        theirs, at = manifest.tokenizer_info, f"validation.store={self.store}"
        if (theirs.sha256, theirs.eot_id) != (tokenizer.sha256, tokenizer.eot_id):
            raise ConfigError(
                f"{at}: has another tokenizer ({theirs.kind}, {theirs.vocab_size:,} words) than this recipe "
                f"({tokenizer.kind}, {tokenizer.vocab_size:,} words); prepare both with one, such as the file "
                f"{theirs.file} of that store"
            )
        kinds = (manifest.kind, manifest.masked), (kind, masked)
        if kinds[0] != kinds[1]:
            holds, makes = (f"{name} {'with' if learned else 'without'} a mask" for name, learned in kinds)
            fix = "name a store that was made with the same form"
            raise ConfigError(f"{at}: holds {holds}, this recipe makes {makes}; {fix}")


AnyValidation = ByKey | Tail | OtherStore | FileSource
ImageValidation = ByKey | FileSource


def explicit(validation: AnyValidation) -> OtherStore | FileSource | None:
    """Returns what names records of its own; None where the validation split is a share of the source."""
    return None if isinstance(validation, ByKey | Tail) else validation


def draw(key: str) -> float:
    """Returns a number in [0, 1) that the key fixes: it decides the split, and what trains the tokenizer."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64
