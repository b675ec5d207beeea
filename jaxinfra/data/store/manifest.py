"""What a version of a store says of itself: `manifest.json`, written last, so that a folder without one is none.

It holds the recipe, the counts, the hash of every file and the baselines. It knows nothing of arrays.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from jaxinfra.errors import DataError
from jaxinfra.storage.errors import DAMAGED_VERSION_FIX

FORMAT = 3
FILE_NAME = "manifest.json"

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
Kind = Literal["text", "pairs", "images"]
KINDS: tuple[Kind, ...] = ("text", "pairs", "images")


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """Describes the contents of one split."""

    documents: int  # number of documents, or of images
    tokens: int  # number of token ids, each document with its end; of images 0
    bytes: int  # bytes of text, or of pixels
    longest: int  # tokens of the longest document
    digest: str  # of the hashes of all blocks, in their order: equal digests are equal contents


@dataclass(frozen=True, kw_only=True)
class PackInfo:
    """One packing of the documents of a split into rows (see `packing`)."""

    rows: int  # number of rows
    segments: int  # documents and parts of documents in them
    truncated: int  # documents that are longer than a row, and so in several
    efficiency: float  # share of the places in the rows that hold a target
    digest: str  # of the arrays


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    """Length of one file of the store, and its XXH3-128; arrays whose blocks are hashed have no hash of the file."""

    bytes: int
    digest: str | None


@dataclass(frozen=True, kw_only=True)
class TokenizerInfo:
    """The tokenizer that made the tokens."""

    kind: str  # of tokenizer (see `tokenizer`)
    file: str  # its file in the store
    sha256: str  # of that file
    end_of_document: str  # how the token that ends a document is spelt
    eot_id: int  # that token
    vocab_size: int  # one more than the largest token id


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Counts what became of the records."""

    records: int = 0  # that were read
    skipped: int = 0  # that could not be read, under the policy that allows it; `skipped.jsonl` lists them
    filtered: Mapping[str, int] = field(default_factory=dict)  # documents that a rule left out, by the rule
    duplicates: int = 0  # documents that repeat an earlier one
    overlap: int = 0  # validation documents that the training source has too, before any is left out
    overlap_dropped: int = 0  # training documents that were left out for it by `on_overlap=drop`


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that is known of a version without opening its arrays."""

    kind: Kind  # of the store: text, pairs of a chosen and a rejected answer, or images
    recipe: Mapping[str, Any]  # the config that it was made from, encoded
    source_digest: str  # hash of the names, sizes and stamps of what was read
    counts: Counts  # what became of the records
    dtype: str  # type of the token ids, or of the pixels
    shape: tuple[int, ...] = ()  # of an image; () for tokens
    masked: bool = False  # whether there is a mask of the tokens that are learned
    block: int  # tokens (or images) whose hash is kept: an inner chunk of the arrays
    tokenizer: TokenizerInfo | None  # None for images
    labels: tuple[str, ...] = ()  # names of the classes of images, in the order of their numbers
    splits: Mapping[Split, SplitInfo]  # what each split holds
    packs: Mapping[str, PackInfo] = field(default_factory=dict)  # by `split/name`, packings of documents into rows
    files: Mapping[str, FileInfo]  # length and hash of every other file, by name relative to the manifest
    baselines: Mapping[str, Mapping[str, float]]  # what a trained model has to beat, by score and by who reaches it
    versions: Mapping[str, str]  # of Python and the packages that made the store
    created: str  # when it was made, in UTC

    @property
    def fingerprint(self) -> str:
        """Hash of what a model can see of the store: equal fingerprints give equal batches."""
        tokenizer = self.tokenizer and [self.tokenizer.sha256, self.tokenizer.eot_id]
        seen = [self.kind, tokenizer, self.dtype, list(self.shape), self.masked, list(self.labels)]
        seen += [[name, info.digest] for name, info in sorted(self.splits.items())]
        seen += [[name, info.digest] for name, info in sorted(self.packs.items())]
        return digest_of(seen)

    @property
    def tokenizer_info(self) -> TokenizerInfo:
        """The tokenizer of a store of text; DataError for one of images."""
        if self.tokenizer is None:
            raise DataError(f"{self.fingerprint}: is a store of {self.kind}, not of text; name another store")
        return self.tokenizer

    def bytes_per_token(self, split: Split) -> float:
        """Mean bytes of text that a token of the split stands for, ends of documents counted as tokens."""
        return self.splits[split].bytes / max(1, self.splits[split].tokens)

    def to_bytes(self) -> bytes:
        """The manifest as a file."""
        tree = asdict(self) | {"format": FORMAT, "fingerprint": self.fingerprint}
        tree["digest"] = digest_of(tree)
        return (json.dumps(tree, indent=2, ensure_ascii=False) + "\n").encode()


def parse_manifest(content: bytes, path: str) -> Manifest:
    """Reads the content of a manifest at `path`; DataError where it is damaged or of a format unknown here."""
    try:
        tree: dict[str, Any] = json.loads(content)
        found, digest = tree["format"], tree.pop("digest")
        if found != FORMAT:
            newer = isinstance(found, int) and found > FORMAT
            raise DataError(
                f"{path}: store format {found}, this version reads format {FORMAT}; "
                + ("update jaxinfra" if newer else "prepare the store again")
            )
        if digest != digest_of(tree):
            raise ValueError("its digest does not fit its contents")
        for name, kind in (("splits", SplitInfo), ("packs", PackInfo), ("files", FileInfo)):
            tree[name] = {each: kind(**info) for each, info in tree[name].items()}
        tree["counts"] = Counts(**tree["counts"])
        tree["tokenizer"] = tree["tokenizer"] and TokenizerInfo(**tree["tokenizer"])
        tree["shape"], tree["labels"] = tuple(tree["shape"]), tuple(tree["labels"])
        manifest = Manifest(**{each.name: tree[each.name] for each in fields(Manifest)})
        _check(manifest, tree["fingerprint"])
        return manifest
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: damaged manifest ({type(error).__name__}: {error}); {DAMAGED_VERSION_FIX}") from None


def digest_of(tree: Any) -> str:
    """BLAKE2b of a tree of JSON values."""
    return hashlib.blake2b(json.dumps(tree, sort_keys=True).encode(), digest_size=16).hexdigest()


def is_fingerprint(name: str) -> bool:
    """Whether a folder of this name is a version, or was to be one."""
    return bool(re.fullmatch("[0-9a-f]{32}", name))


def _check(manifest: Manifest, fingerprint: str) -> None:
    """Raises ValueError where what all readers take for granted is not so."""
    infos = manifest.splits.values()
    counted = [manifest.block - 1, *(n for i in infos for n in (i.documents, i.tokens, i.bytes, i.longest))]
    if set(manifest.splits) != set(SPLITS) or manifest.kind not in KINDS:
        raise ValueError(f"is {manifest.kind} in {', '.join(manifest.splits) or 'no splits'}")
    if (manifest.tokenizer is None) != (manifest.kind == "images"):
        raise ValueError(f"is {manifest.kind} {'without' if manifest.tokenizer is None else 'with'} a tokenizer")
    if not all(type(count) is int and count >= 0 for count in counted):
        raise ValueError("counts something in other than whole numbers from 0")
    if fingerprint != manifest.fingerprint:
        raise ValueError("its fingerprint is not that of its contents")
