"""The manifest of a version of a store, `manifest.json`: recipe, counts, hash of every file, baselines.

It is written last, so that a folder without a manifest is recognized as incomplete.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, Literal, get_args

from jaxinfra.data.store import layout
from jaxinfra.data.store.layout import ArrayInfo, table_sizes
from jaxinfra.data.tokenizer import Tokenizer
from jaxinfra.errors import DataError
from jaxinfra.storage.errors import DAMAGED_VERSION_FIX

FORMAT = 4  # the only format that is read and written
FILE_NAME = "manifest.json"

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
Kind = Literal["text", "pairs", "labeled", "images"]


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """Describes the contents of one split."""

    documents: int  # number of documents, or of images
    tokens: int  # number of token ids, including end-of-document tokens; 0 for images
    bytes: int  # UTF-8 bytes of text, or bytes of pixels
    longest: int  # tokens of the longest document


@dataclass(frozen=True, kw_only=True)
class PackInfo:
    """Describes one packing of the documents of a split into rows (see `packing`)."""

    rows: int  # number of rows
    segments: int  # number of segments: documents, and parts of long ones
    truncated: int  # documents that are longer than a row
    efficiency: float  # share of the room in the rows that targets fill


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """Describes one file of the store."""

    bytes: int
    digest: str | None  # XXH3-128; None for a file of blocks, which have hashes of their own


@dataclass(frozen=True, kw_only=True)
class TokenizerInfo:
    """Describes the tokenizer of the store."""

    kind: str  # tokenizer_json or bytes
    file: str  # name of the tokenizer's file in the store
    sha256: str  # hash of that file
    end_of_document: str  # text of the token that ends a document
    eot_id: int  # id of that token
    vocab_size: int  # one more than the largest token id

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer) -> "TokenizerInfo":
        """Describes a tokenizer."""
        return cls(
            kind=tokenizer.kind,
            file=tokenizer.file_name,
            sha256=tokenizer.sha256,
            end_of_document=tokenizer.end_of_document,
            eot_id=tokenizer.eot_id,
            vocab_size=tokenizer.vocab_size,
        )


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Counts the records that were read, and the documents that were left out."""

    records: int = 0  # records read
    skipped: int = 0  # bad records, skipped by `on_bad=skip`; `skipped.jsonl` lists them
    filtered: Mapping[str, int] = field(default_factory=dict)  # filter rule -> documents that it left out
    duplicates: int = 0  # documents that repeat an earlier one
    overlap: int = 0  # validation documents that are in the training source too
    overlap_dropped: int = 0  # training documents that `on_overlap=drop` left out
    repeated: float = 0.0  # share of the validation text that is in the training text too, measured with the baselines


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Describes a version of a store."""

    kind: Kind  # text, pairs of a chosen and a rejected answer, or images
    recipe: Mapping[str, object]  # the config that prepared it, encoded
    source_digest: str  # hash of the names, sizes and stamps of the source files
    counts: Counts
    dtype: str  # NumPy type of the token ids or the pixels
    shape: tuple[int, ...] = ()  # shape of an image; () for tokens
    masked: bool = False  # whether it has a mask of the tokens that count in the loss
    block: int  # number of tokens or images in a block, which is a chunk of the arrays and has its own hash
    index_block: int  # the same for all other arrays
    tokenizer: TokenizerInfo | None = None  # None for images
    labels: tuple[str, ...] = ()  # names of the image classes, in the order of their numbers
    splits: Mapping[Split, SplitInfo]
    packs: Mapping[str, PackInfo] = field(default_factory=dict)  # `split/name` -> packing
    files: Mapping[str, StoredFile]  # every other file, by name relative to the manifest
    # Metric -> simple model -> value on the validation split.
    baselines: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    versions: Mapping[str, str]  # of Python and the packages that prepared the store
    prepared_from: str = ""  # words after `data prepare`, of which hints make a command; "" if no command line did
    created: str  # time in UTC

    @property
    def fingerprint(self) -> str:
        """Hash of everything that affects batches: equal fingerprints give equal batches."""
        tokenizer = None if self.tokenizer is None else [self.tokenizer.sha256, self.tokenizer.eot_id]
        contents = [self.kind, tokenizer, self.dtype, list(self.shape), self.masked, list(self.labels)]
        for name, array in sorted(self.arrays.items()):
            tables = table_sizes(name, array.blocks)
            contents.append([name, array.elements, array.block, [self.files[table].digest for table in tables]])
        return digest_of(contents)

    @cached_property
    def arrays(self) -> Mapping[str, ArrayInfo]:
        """The arrays by name, such as `train/tokens`."""
        found = {}
        for split, info in self.splits.items():
            if self.kind == "images":
                data, index = {layout.IMAGES: info.documents}, {layout.LABELS: info.documents}
            else:
                data = {layout.TOKENS: info.tokens} | ({layout.MASK: info.tokens} if self.masked else {})
                index = {layout.OFFSETS: info.documents + 1, layout.LENGTHS: info.documents}
            found |= {f"{split}/{name}": ArrayInfo(elements=count, block=self.block) for name, count in data.items()}
            found |= {f"{split}/{name}": self._index_info(count) for name, count in index.items()}
        for key, pack in self.packs.items():
            split, _, name = key.partition("/")
            found[f"{split}/{layout.PACKS}/{name}/{layout.ROWS}"] = self._index_info(pack.rows + 1)
            found[f"{split}/{layout.PACKS}/{name}/{layout.SEGMENTS}"] = self._index_info(pack.segments)
        return found

    def _index_info(self, elements: int) -> ArrayInfo:
        return ArrayInfo(elements=elements, block=self.index_block)

    @property
    def tokenizer_info(self) -> TokenizerInfo:
        """The tokenizer, required: DataError for a store of images."""
        if self.tokenizer is None:
            raise DataError(f"{self.fingerprint}: holds {self.kind}, expected text; name a store of text")
        return self.tokenizer

    def to_bytes(self) -> bytes:
        """Returns the content of `manifest.json`."""
        tree = asdict(self) | {"format": FORMAT, "fingerprint": self.fingerprint}
        tree["digest"] = digest_of(tree)
        return (json.dumps(tree, indent=2, ensure_ascii=False) + "\n").encode()


def parse_manifest(content: bytes, path: str) -> Manifest:
    """Parses the content of the manifest at `path`; DataError if it is damaged or of another format."""
    try:
        tree: dict[str, Any] = json.loads(content)
        store_format, digest = tree["format"], tree.pop("digest")
        if store_format != FORMAT:
            is_newer = isinstance(store_format, int) and store_format > FORMAT
            fix = "update jaxinfra" if is_newer else "prepare the store again"
            raise DataError(f"{path}: store format {store_format}, this version reads format {FORMAT}; {fix}")
        if digest != digest_of(tree):
            raise ValueError("digest does not match the contents")
        for name, cls in (("splits", SplitInfo), ("packs", PackInfo), ("files", StoredFile)):
            tree[name] = {key: cls(**info) for key, info in tree[name].items()}
        tree["counts"] = Counts(**tree["counts"])
        if tree["tokenizer"] is not None:
            tree["tokenizer"] = TokenizerInfo(**tree["tokenizer"])
        tree["shape"], tree["labels"] = tuple(tree["shape"]), tuple(tree["labels"])
        manifest = Manifest(**{field.name: tree[field.name] for field in fields(Manifest) if field.name in tree})
        _check(manifest, tree["fingerprint"])
        return manifest
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: damaged manifest ({type(error).__name__}: {error}); {DAMAGED_VERSION_FIX}") from None


def digest_of(tree: object) -> str:
    """Returns the BLAKE2b hash of a tree of JSON values."""
    return hashlib.blake2b(json.dumps(tree, sort_keys=True).encode(), digest_size=16).hexdigest()


def is_fingerprint(name: str) -> bool:
    """Returns whether a folder of this name is a version, complete or not."""
    return bool(re.fullmatch("[0-9a-f]{32}", name))


def _check(manifest: Manifest, fingerprint: str) -> None:
    """Raises ValueError if the manifest contradicts itself or the fingerprint that it was written with."""
    counts = [manifest.block - 1, manifest.index_block - 1]  # a block has at least one element
    counts += [n for info in manifest.splits.values() for n in (info.documents, info.tokens, info.bytes, info.longest)]
    counts += [n for pack in manifest.packs.values() for n in (pack.rows, pack.segments)]
    if set(manifest.splits) != set(SPLITS) or manifest.kind not in get_args(Kind):
        raise ValueError(f"kind {manifest.kind}, splits {', '.join(manifest.splits) or 'none'}")
    if (manifest.tokenizer is None) != (manifest.kind == "images"):
        raise ValueError(f"{manifest.kind} {'without' if manifest.tokenizer is None else 'with'} a tokenizer")
    if not all(type(count) is int and count >= 0 for count in counts):  # isinstance would accept true and false
        raise ValueError("a count is not a whole number from 0")
    hashed = {f"{name}/{layout.DESCRIPTION}" for name in manifest.arrays}
    hashed |= {manifest.tokenizer.file} if manifest.tokenizer is not None else set()
    for name in sorted(hashed):
        if name not in manifest.files or manifest.files[name].digest is None:
            raise ValueError(f"no hash of {name}")
    for array, info in manifest.arrays.items():
        for name, size_bytes in table_sizes(array, info.blocks).items():
            if name not in manifest.files or manifest.files[name].bytes != size_bytes:
                raise ValueError(f"no hashes of all {info.blocks} blocks of {array}")
    if fingerprint != manifest.fingerprint:
        raise ValueError("fingerprint does not match the contents")
