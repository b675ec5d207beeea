"""Reads a version of a store, on disk or in a bucket; docs/data.md describes the files.

A version has `manifest.json`, the tokenizer, and zarr 3 arrays for each split. A folder without a manifest is not a
version. All that is read is compared with its hash (see `blocks`): what is damaged, stale, of another store, short or
missing is an error that names it.

Shape suffixes: P ranges, N tokens of all ranges.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Self

import numpy as np
import xxhash

from jaxinfra.command import COMMAND
from jaxinfra.data.store import arrays, dvc_tracking, versions
from jaxinfra.data.store import manifest as manifests
from jaxinfra.data.store.blocks import CheckedArray, read_file, read_together
from jaxinfra.data.store.layout import IMAGES, MASK, OFFSETS, TOKENS, holds_blocks
from jaxinfra.data.store.manifest import Kind, Manifest, Split
from jaxinfra.data.tokenizer import Tokenizer, load_tokenizer
from jaxinfra.errors import ConfigError, DataError
from jaxinfra.storage.errors import DAMAGED_VERSION_FIX
from jaxinfra.storage.objects import ObjectStore

PREPARE = f"{COMMAND} data prepare RECIPE"  # for messages
_VERIFY_BATCH = 256  # blocks to read at once


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the smallest type for all ids and the fill value of the arrays, which is the largest of the type."""
    return np.dtype(np.uint16 if vocab_size < 2**16 else np.uint32)


@dataclass(frozen=True, kw_only=True)
class Damage:
    """A damaged file of the store, or a damaged block of an array."""

    location: str  # the file or array, and the number of the block
    cause: str


class Store:
    """A version of a store, opened for reading; safe to use from many threads."""

    def __init__(self, storage: ObjectStore, manifest: Manifest):
        self.storage, self.manifest = storage, manifest
        self._arrays: dict[str, CheckedArray] = {}

    @classmethod
    def open(
        cls,
        path: str | Path,
        version: str | None = None,
        *,
        section: str = "data",
        hint: str = PREPARE,
        allow_missing_blocks: bool = False,
        kind: Kind | None = None,
    ) -> Self:
        """Opens a version and checks its manifest and the length of every file.

        Args:
            path: folder or URL of the store or of one of its versions, or its `.dvc` file.
            version: fingerprint of the version, or the start of it; None is the newest.
            section: section of the config that names the store, for messages.
            hint: command that prepares the store, for the message if it is missing.
            allow_missing_blocks: a file of blocks that is missing or short is an error only when it is read.
            kind: what the store must hold; None allows everything.

        Raises ConfigError if there is no such store or version, or it holds something else; DataError if it is damaged
        or has another format; and StorageError if it cannot be read.
        """
        location = ObjectStore(dvc_tracking.resolve_path(str(path)))
        storage = versions.find_version(location, version, section=section, hint=hint)
        manifest_path = storage.url_of(manifests.FILE_NAME)
        manifest = manifests.parse_manifest(storage.read(manifests.FILE_NAME), manifest_path)
        folder = storage.url.rpartition("/")[2]
        if manifests.is_fingerprint(folder) and manifest.fingerprint != folder:
            cause = f"has the fingerprint {manifest.fingerprint}, expected {folder}"
            raise DataError(f"{manifest_path}: {cause}; {DAMAGED_VERSION_FIX}")
        if version is not None and not manifest.fingerprint.startswith(version):
            raise ConfigError(
                f"{section}.version={version}: {storage.url} is version {manifest.fingerprint}; "
                f"use {section}.version=none"
            )
        if kind not in (None, manifest.kind):
            raise ConfigError(f"{section}.store={path}: holds {manifest.kind}, expected {kind}; name a store of {kind}")
        checked = [name for name in manifest.files if not (allow_missing_blocks and holds_blocks(name))]
        storage.check_sizes({name: manifest.files[name].bytes for name in checked})
        return cls(storage, manifest)

    def __str__(self) -> str:
        return self.storage.url

    def verify(self) -> Iterator[tuple[int, Damage | None]]:
        """Compares all files with their hashes; yields bytes read and damage of each file or block.

        StorageError if a file cannot be read.
        """
        for name, info in self.manifest.files.items():
            if info.digest is not None:
                content = self.storage.read(name)
                is_intact = xxhash.xxh3_128_hexdigest(content) == info.digest
                yield info.bytes, None if is_intact else Damage(location=name, cause="does not match its hash")
        for name, info in self.manifest.arrays.items():
            try:
                array = self._open(name)
                for first in range(0, info.blocks, _VERIFY_BATCH):
                    numbers = range(first, min(first + _VERIFY_BATCH, info.blocks))
                    for block, (content, cause) in enumerate(array.check(numbers), first):
                        damage = None if cause is None else Damage(location=f"{name} block {block}", cause=cause)
                        yield content.nbytes, damage
            except DataError as error:
                yield 0, Damage(location=name, cause=str(error))

    def read_ranges(self, split: Split, name: str, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Reads ranges of an array of a split, such as `tokens` or `offsets`, concatenated.

        `starts` and `lengths` are int64[P]. DataError if a range is outside the array, or damaged.
        """
        return self._open(f"{split}/{name}").read(starts, lengths)

    def read_all(self, split: Split, name: str) -> np.ndarray:
        """Reads a whole array; DataError if it is damaged."""
        return self._open(f"{split}/{name}").read_all()

    def _open(self, name: str) -> CheckedArray:
        """Opens an array, or returns it if it is open."""
        if name not in self._arrays:
            self._arrays[name] = CheckedArray(self.storage, self.manifest, name, partial(self._locate, name))
        return self._arrays[name]

    def _locate(self, name: str, first: int, end: int) -> str:
        """Describes a range of elements of an array, for messages; for tokens, it names their documents."""
        split, _, array = name.partition("/")
        if array not in (TOKENS, MASK):
            return f"{IMAGES if array == IMAGES else 'elements'} {first} to {end - 1}"
        offsets = self._open(f"{split}/{OFFSETS}")

        def start_of(document: int) -> int:
            return int(offsets.read(np.array([document]), np.array([1]))[0])

        def document_of(token: int) -> int:  # with documents from 0, 5 and 9 on, token 5 is in document 1
            return bisect_right(range(offsets.info.elements), token, key=start_of) - 1

        try:
            one, last = document_of(first), document_of(end - 1)
            documents = f"documents {one} to {last}" if one < last else f"document {one}"
        except DataError:
            documents = f"documents unknown, because {split}/{OFFSETS} is damaged, too"
        return f"{TOKENS} {first} to {end - 1}, {documents}"


class TokenStore(Store):
    """A version of a store of text, or of pairs of texts."""

    def __init__(self, storage: ObjectStore, manifest: Manifest):
        """Reads the tokenizer; DataError if it is not the one of the manifest."""
        super().__init__(storage, manifest)
        info = manifest.tokenizer_info
        self._tokenizer_content = read_file(storage, manifest, info.file)
        if hashlib.sha256(self._tokenizer_content).hexdigest() != info.sha256:
            raise DataError(f"{self}/{info.file}: is not the tokenizer of the manifest; {DAMAGED_VERSION_FIX}")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the store."""
        info = self.manifest.tokenizer_info
        return load_tokenizer(info.kind, self._tokenizer_content, info.end_of_document, name=f"{self}/{info.file}")

    def read(self, split: Split, starts: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
        """Reads `length` consecutive tokens from each of `starts`, [P]; returns [P, length] of the store's type.

        DataError if tokens are outside the split, damaged, or not in the vocabulary.
        """
        return self._read_tokens(split, np.asarray(starts, np.int64), np.full(len(starts), length)).reshape(-1, length)

    def read_with_mask(
        self, split: Split, starts: np.ndarray, lengths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Reads ranges of tokens, and of the mask of tokens that count in the loss, as in `read_ranges`.

        Checks ids like `read`. The mask is uint8, and None if the store has none.
        """
        tokens_N = self._read_tokens(split, starts, lengths)
        return tokens_N, self.read_ranges(split, MASK, starts, lengths) if self.manifest.masked else None

    def sample_tokens(self, split: Split, limit: int) -> np.ndarray:
        """Reads all tokens of a split, or about `limit` of them in evenly spaced chunks if it has more."""
        tokens = self.manifest.splits[split].tokens
        if tokens <= limit:
            return self.read(split, [0], tokens)[0]
        num_chunks = max(1, limit // arrays.CHUNK)
        starts = np.arange(num_chunks) * (tokens - arrays.CHUNK) // num_chunks
        return self.read(split, starts, arrays.CHUNK).reshape(-1)

    def _read_tokens(self, split: Split, starts_P: np.ndarray, lengths_P: np.ndarray) -> np.ndarray:
        """Reads ranges of tokens; DataError, which names the range, if an id is not in the vocabulary."""
        tokens_N = self.read_ranges(split, TOKENS, starts_P, lengths_P)
        vocab_size = self.manifest.tokenizer_info.vocab_size
        if tokens_N.size and int(tokens_N.max()) >= vocab_size:
            first_bad = int((tokens_N >= vocab_size).argmax())
            # With lengths of 3 and 5, tokens 0 to 2 are in range 0, and tokens 3 to 7 in range 1.
            i = int(np.searchsorted(np.cumsum(lengths_P), first_bad, side="right"))
            raise DataError(
                f"{self}/{split}/{TOKENS}: an id beyond the vocabulary of {vocab_size} in tokens {starts_P[i]} to "
                f"{starts_P[i] + lengths_P[i]}; {DAMAGED_VERSION_FIX}"
            )
        return tokens_N


def read_tokens_together(split: Split, parts: Sequence[tuple[TokenStore, np.ndarray, np.ndarray]]) -> np.ndarray:
    """Reads ranges (starts and lengths) of tokens of several stores with one tokenizer, concatenated.

    Raises as `TokenStore.read`.
    """
    name = f"{split}/{TOKENS}"
    tokens_N = read_together([(store._open(name), starts_P, lengths_P) for store, starts_P, lengths_P in parts])
    if tokens_N.size and int(tokens_N.max()) >= parts[0][0].manifest.tokenizer_info.vocab_size:
        return np.concatenate([store._read_tokens(split, *ranges) for store, *ranges in parts])  # tells where
    return tokens_N
