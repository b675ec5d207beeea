"""A store: tokens on disk or in a bucket, in versions that stand beside one another and never change.

    versions.json            which versions there are, the newest last (see `versions`)
    FINGERPRINT/
      manifest.json          what is in it; written last
      tokenizer.*            how to read it
      {train,validation}/
        tokens               uint16 or uint32: all documents, each closed by the end-of-document token
        mask                 uint8, where not all is learned: 1 for tokens that are
        offsets, lengths     int64[documents + 1], int64[documents]: where each document starts, and its tokens
        tokens.blocks, mask.blocks   uint64: XXH3 of each block of tokens
        packs/NAME/pieces    int64[pieces, 2]: where each piece of a document starts, and its targets (see `packing`)
        packs/NAME/rows      int64[rows + 1]: where the pieces of each row start
      or, of images,
        images, labels       uint8[images, height, width, channels], int32[images]
        images.blocks        uint64: XXH3 of each block of images

All arrays are zarr 3 (see `arrays`). Invariants: a folder without a manifest is no version; whatever is damaged, short
or missing is an error that names it, never a silent zero. docs/data.md describes the format for other readers.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import tensorstore as ts
import xxhash

from jaxinfra.command import COMMAND
from jaxinfra.data.store import arrays, dvc_tracking, versions
from jaxinfra.data.store import manifest as manifests
from jaxinfra.data.store.manifest import SPLITS, FileInfo, Manifest, Split, TokenizerInfo
from jaxinfra.data.tokenizer import Tokenizer, load_tokenizer
from jaxinfra.errors import ConfigError, DataError
from jaxinfra.storage.errors import DAMAGED_VERSION_FIX
from jaxinfra.storage.objects import ObjectStore

PREPARE = f"{COMMAND} data prepare RECIPE"
TOKENS, MASK, OFFSETS, LENGTHS = "tokens", "mask", "offsets", "lengths"
IMAGES, LABELS = "images", "labels"
BLOCKS = ".blocks"
_PIECE = arrays.CHUNK
_VERIFIED_AT_ONCE = 256


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest type that holds the vocabulary and one value more, which marks what was never written."""
    return np.dtype(np.uint16 if vocab_size < 2**16 else np.uint32)


@dataclass(frozen=True, kw_only=True)
class Damage:
    """Names a file of the store, or a block of an array by its number, that does not fit its hash."""

    file: str
    block: int | None = None
    cause: str

    @property
    def place(self) -> str:
        """The file, and the block of it."""
        return self.file if self.block is None else f"{self.file} block {self.block}"

    def __str__(self) -> str:
        return f"{self.place}: {self.cause}"


class Store:
    """A version opened for reading; safe to read from many threads."""

    def __init__(self, storage: ObjectStore, manifest: Manifest):
        """Takes a version whose files are there."""
        self.storage, self.manifest = storage, manifest
        self._arrays: dict[str, ts.TensorStore] = {}

    @classmethod
    def open(cls, path: str | Path, version: str | None = None, *, at: str = "data", hint: str = PREPARE) -> Self:
        """Opens a version and checks its manifest and the length of every file.

        Raises ConfigError where there is no store, or not that version of it, DataError where it is damaged or of a
        newer format, and StorageError where it may not be read.

        Args:
            path: folder or URL of the store, or of one of its versions, or its `.dvc` file.
            version: fingerprint of the one to open, or its beginning; None is the newest.
            at: the part of the config that names the store, for messages.
            hint: the command that makes the store, for the error when there is none.
        """
        storage = versions.find_version(ObjectStore(dvc_tracking.resolve_path(str(path))), version, at=at, hint=hint)
        found = manifests.parse_manifest(storage.read(manifests.FILE_NAME), storage.url_of(manifests.FILE_NAME))
        named = storage.url.rpartition("/")[2]
        if manifests.is_fingerprint(named) and found.fingerprint != named:
            raise DataError(
                f"{storage.url_of(manifests.FILE_NAME)}: is of version {found.fingerprint}, not of {named}; "
                f"{DAMAGED_VERSION_FIX}"
            )
        if version is not None and not found.fingerprint.startswith(version):
            raise ConfigError(
                f"{at}.version={version}: {storage.url} is version {found.fingerprint}; use {at}.version=none"
            )
        storage.check_sizes({name: info.bytes for name, info in found.files.items()})
        return cls(storage, found)

    def __str__(self) -> str:
        return self.storage.url

    def hashed_arrays(self, split: Split) -> Iterator[tuple[str, int]]:
        """The arrays of a split whose blocks are hashed, and how many elements they have."""
        info = self.manifest.splits[split]
        if self.manifest.kind == "images":
            yield IMAGES, info.documents
        else:
            yield TOKENS, info.tokens
            if self.manifest.masked:
                yield MASK, info.tokens

    def verify(self) -> Iterator[tuple[str, int, Damage | None]]:
        """Reads all there is and compares it with its hashes; StorageError where it may not or cannot be read.

        It yields what was looked at, bytes of it, and the damage if there is any.
        """
        for name, info in self.manifest.files.items():
            if info.digest is not None:
                content = self.storage.read(name)
                fits = xxhash.xxh3_128_hexdigest(content) == info.digest
                yield name, info.bytes, None if fits else Damage(file=name, cause="does not fit its hash")
        for split in self.manifest.splits:
            for name, count in self.hashed_arrays(split):
                yield from self._verify_blocks(split, name, count)

    def _verify_blocks(self, split: Split, name: str, count: int) -> Iterator[tuple[str, int, Damage | None]]:
        file, block = f"{split}/{name}", self.manifest.block
        try:
            array, hashes = self.array(split, name), self.read_all(split, name + BLOCKS)
        except DataError as error:
            yield file, 0, Damage(file=file, cause=str(error))
            return
        starts = np.arange(0, count, block)
        if len(hashes) != len(starts):
            yield file, 0, Damage(file=file, cause=f"has {len(starts)} blocks, and hashes of {len(hashes)}")
            return
        for first in range(0, len(starts), _VERIFIED_AT_ONCE):
            some = starts[first : first + _VERIFIED_AT_ONCE]
            found = arrays.read_each(array, f"{self}/{file}", some.tolist(), np.minimum(block, count - some).tolist())
            for number, content in enumerate(found, first):
                if isinstance(content, DataError):
                    yield file, 0, Damage(file=file, block=number, cause=str(content))
                else:
                    fits = hash_block(content) == int(hashes[number])
                    damage = None if fits else Damage(file=file, block=number, cause="does not fit its hash")
                    yield file, content.nbytes, damage

    def read_ranges(self, split: Split, name: str, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Reads ranges of any array of a split, such as `tokens`, `mask` or `offsets`: one after the other.

        `starts` and `lengths` are int64[N]. DataError where one lies outside the array or what is read is damaged.
        """
        path = f"{self}/{split}/{name}"
        return arrays.read_ranges(self.array(split, name), path, starts.tolist(), lengths.tolist())

    def read_all(self, split: Split, name: str) -> np.ndarray:
        """All of an array; DataError where it is damaged."""
        array = self.array(split, name)
        return arrays.read_ranges(array, f"{self}/{split}/{name}", [0], [array.shape[0]])

    def array(self, split: Split, name: str) -> ts.TensorStore:
        """An array, opened once."""
        key = f"{split}/{name}"
        if key not in self._arrays:
            self._arrays[key] = arrays.open_array(self.storage.url_of(key), arrays.cache_context())
        return self._arrays[key]


class TokenStore(Store):
    """A version of a store of text, or of pairs of texts."""

    def __init__(self, storage: ObjectStore, manifest: Manifest):
        """Takes a version whose files are there; DataError where its tokenizer is damaged, or another one."""
        super().__init__(storage, manifest)
        info = manifest.tokenizer_info
        self._vocabulary = storage.read(info.file)
        if hashlib.sha256(self._vocabulary).hexdigest() != info.sha256:
            raise DataError(f"{self}/{info.file}: is not the tokenizer that made the store; {DAMAGED_VERSION_FIX}")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """What made the tokens."""
        info = self.manifest.tokenizer_info
        return load_tokenizer(info.kind, self._vocabulary, info.end_of_document, name=f"{self}/{info.file}")

    def read(self, split: Split, starts: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
        """Reads windows of consecutive tokens that begin at `starts`, int64[N]: [N, length] of the store's type.

        DataError where a window lies outside the split or what is read is damaged.
        """
        window_NL = self._windows(split, TOKENS, starts, length)
        self._check(split, window_NL.reshape(-1), np.asarray(starts), np.full(len(starts), length))
        return window_NL

    def read_segments(
        self, split: Split, starts: np.ndarray, lengths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Reads ranges of tokens, and of the mask where there is one: one after the other, as `read_ranges`."""
        tokens_N = self.read_ranges(split, TOKENS, starts, lengths)
        self._check(split, tokens_N, starts, lengths)
        return tokens_N, self.read_ranges(split, MASK, starts, lengths) if self.manifest.masked else None

    def read_mask(self, split: Split, starts: Sequence[int] | np.ndarray, length: int) -> np.ndarray | None:
        """Reads which tokens of windows are learned, uint8[N, length], as `read`; None where the store has no mask."""
        return self._windows(split, MASK, starts, length) if self.manifest.masked else None

    def sample_tokens(self, split: Split, limit: int) -> np.ndarray:
        """All tokens of a split, or about `limit` of them in evenly spaced pieces if it has more."""
        tokens = self.manifest.splits[split].tokens
        if tokens <= limit:
            return self.read(split, [0], tokens)[0]
        pieces = max(1, limit // _PIECE)
        return self.read(split, np.arange(pieces) * (tokens - _PIECE) // pieces, _PIECE).reshape(-1)

    def offsets(self, split: Split) -> np.ndarray:
        """Where each document starts, and the end of the last: int64[documents + 1]."""
        return self.read_all(split, OFFSETS)

    def lengths(self, split: Split) -> np.ndarray:
        """Tokens of each document, with its end: int64[documents]."""
        return self.read_all(split, LENGTHS)

    def _windows(self, split: Split, name: str, starts: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
        starts = np.asarray(starts, np.int64)
        tokens = self.manifest.splits[split].tokens
        outside = (starts < 0) | (starts + length > tokens)
        if outside.any():
            first = int(starts[outside][0])
            raise DataError(f"{self}/{split}/{name}: asked for tokens {first} to {first + length}, has {tokens}")
        return arrays.read_windows(self.array(split, name), f"{self}/{split}/{name}", starts.tolist(), length)

    def _check(self, split: Split, tokens_N: np.ndarray, starts_P: np.ndarray, lengths_P: np.ndarray) -> None:
        words = self.manifest.tokenizer_info.vocab_size
        if tokens_N.size and int(tokens_N.max()) >= words:
            piece = int(np.searchsorted(np.cumsum(lengths_P), (tokens_N >= words).argmax(), side="right"))
            raise DataError(
                f"{self}/{split}/{TOKENS}: an id beyond the vocabulary of {words} in tokens {starts_P[piece]} to "
                f"{starts_P[piece] + lengths_P[piece]}; {DAMAGED_VERSION_FIX}"
            )


def info_of(tokenizer: Tokenizer) -> TokenizerInfo:
    """What a manifest says of a tokenizer."""
    return TokenizerInfo(
        kind=tokenizer.kind,
        file=tokenizer.file_name,
        sha256=tokenizer.sha256,
        end_of_document=tokenizer.end_of_document,
        eot_id=tokenizer.eot_id,
        vocab_size=tokenizer.vocab_size,
    )


def hash_block(values: np.ndarray) -> int:
    """XXH3 of values as little-endian integers."""
    little = values.astype(values.dtype.newbyteorder("<"), copy=False)
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(little).data)


def hash_files(folder: Path, unhashed: Sequence[str]) -> dict[str, FileInfo]:
    """Length and hash of every file below a folder, by relative name; of `unhashed` arrays the blocks have hashes."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            in_blocks = any(name.startswith(f"{split}/{each}/c/") for split in SPLITS for each in unhashed)
            digest = None if in_blocks else xxhash.xxh3_128_hexdigest(path.read_bytes())
            found[name] = FileInfo(bytes=path.stat().st_size, digest=digest)
    return found
