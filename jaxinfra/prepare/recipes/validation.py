"""Where the validation split of a store comes from: a fraction of the source, another source, or another store."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt, Lt

from jaxinfra.config.limits import NonEmptyStr
from jaxinfra.data.store.manifest import Split, TokenizerInfo
from jaxinfra.data.store.store import TokenStore
from jaxinfra.errors import ConfigError
from jaxinfra.prepare.sources.any_source import BoundedSource
from jaxinfra.prepare.sources.files import FileInfo, split_files
from jaxinfra.prepare.sources.record import SourceShard

type Fraction = Annotated[float, Gt(0), Lt(1)]


@dataclass(frozen=True, kw_only=True)
class ByKey:
    """Draws each record by a hash of its key, so its split stays the same when other records are added or removed.

    Attributes:
        fraction: expected fraction of the records.
    """

    fraction: Fraction = 0.05


@dataclass(frozen=True, kw_only=True)
class Tail:
    """Takes the end of the text, in source order.

    Plain text is split between two tokens, so one long document is enough; conversations and pairs stay whole.

    Attributes:
        fraction: fraction of the bytes of text.
    """

    fraction: Fraction = 0.05


@dataclass(frozen=True, kw_only=True)
class LastDocuments(Tail):
    """Takes the last documents, in source order, whole where there are enough.

    They have between half and double the fraction of the text. If no documents do, as in a single file, plain text is
    split where a line begins, else a word.

    Attributes:
        fraction: fraction of the bytes of text.
    """


@dataclass(frozen=True, kw_only=True)
class OtherStore:
    """Copies a split of another store, which must have the same tokenizer and format.

    Attributes:
        store: folder or URL.
        version: a fingerprint or its beginning; None is the newest.
        split: the split to copy.
    """

    store: NonEmptyStr = ""
    version: str | None = None
    split: Split = "validation"

    def open(self, fingerprint: str | None = None) -> TokenStore:
        """Opens the store; ConfigError if it is missing or holds images, DataError if it is damaged."""
        return TokenStore.open(self.store, fingerprint or self.version, section="validation")

    def list_shards(self, shard_bytes: int) -> Sequence[SourceShard]:
        """Lists ranges of records; the name of a shard is the fingerprint of the version. Raises as `open`."""
        manifest = self.open().manifest
        info, documents_per_record = manifest.splits[self.split], 2 if manifest.kind == "pairs" else 1
        file = FileInfo(name=manifest.fingerprint, size_bytes=info.bytes, stamp=self.split)
        return split_files([file], lambda _: info.documents // documents_per_record, shard_bytes)

    def require_same(self, tokenizer: TokenizerInfo, *, kind: str, masked: bool) -> None:
        """Raises ConfigError if another tokenizer or format made the store, and as `open`."""
        manifest = self.open().manifest
        theirs, field = manifest.tokenizer_info, f"validation.store={self.store}"
        if (theirs.sha256, theirs.eot_id) != (tokenizer.sha256, tokenizer.eot_id):
            raise ConfigError(
                f"{field}: has another tokenizer ({theirs.kind}, {theirs.vocab_size:,} tokens) than this recipe "
                f"({tokenizer.kind}, {tokenizer.vocab_size:,} tokens); prepare both with the same one, such as "
                f"{theirs.file} of that store"
            )
        if (manifest.kind, manifest.masked) != (kind, masked):
            holds, makes = _describe(manifest.kind, manifest.masked), _describe(kind, masked)
            raise ConfigError(f"{field}: holds {holds}, this recipe makes {makes}; use a store of the same format")


def _describe(kind: str, masked: bool) -> str:
    return f"{kind} {'with' if masked else 'without'} a mask"


AnyValidation = ByKey | Tail | LastDocuments | OtherStore | BoundedSource
ImageValidation = ByKey | BoundedSource


def validation_source(validation: AnyValidation) -> OtherStore | BoundedSource | None:
    """Returns the source of the validation split; None if it is a fraction of the training source."""
    return None if isinstance(validation, ByKey | Tail) else validation


def hash_to_unit(key: str) -> float:
    """Hashes a key to [0, 1); decides the split, and which records train the tokenizer."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64
