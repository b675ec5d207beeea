"""Reads a version of a store, on disk or in a bucket; docs/data.md describes the files.

A version has `manifest.json`, the tokenizer, and zarr 3 arrays for each split (see `arrays`). A folder without a
manifest is not a version. Anything damaged, short or missing is an error that names it, and never read as zeros.
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
from jaxinfra.data.store.manifest import SPLITS, Manifest, Split, StoredFile
from jaxinfra.data.tokenizer import Tokenizer, load_tokenizer
from jaxinfra.errors import ConfigError, DataError
from jaxinfra.storage.errors import DAMAGED_VERSION_FIX
from jaxinfra.storage.objects import ObjectStore

PREPARE = f"{COMMAND} data prepare RECIPE"  # for messages
# Names of the arrays of a split, and the suffix of the arrays with the hashes of their blocks.
TOKENS, MASK, OFFSETS, LENGTHS = "tokens", "mask", "offsets", "lengths"
IMAGES, LABELS = "images", "labels"
BLOCKS = ".blocks"
_VERIFY_BATCH = 256  # blocks to read at once
_WRONG_HASH = "does not match its hash"


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the smallest type for the vocabulary and one more value, the fill value of the arrays."""
    return np.dtype(np.uint16 if vocab_size < 2**16 else np.uint32)


@dataclass(frozen=True, kw_only=True)
class Damage:
    """A damaged file of the store, or a damaged block of an array."""

    file: str
    block: int | None = None
    cause: str

    @property
    def location(self) -> str:
        """The file, and the number of the block."""
        return self.file if self.block is None else f"{self.file} block {self.block}"

    def __str__(self) -> str:
        return f"{self.location}: {self.cause}"


class Store:
    """A version of a store, opened for reading; safe to use from many threads."""

    def __init__(self, storage: ObjectStore, manifest: Manifest):
        self.storage, self.manifest = storage, manifest
        self._arrays: dict[str, ts.TensorStore] = {}

    @classmethod
    def open(cls, path: str | Path, version: str | None = None, *, section: str = "data", hint: str = PREPARE) -> Self:
        """Opens a version and checks its manifest and the length of every file.

        Args:
            path: folder or URL of the store or of one of its versions, or its `.dvc` file.
            version: fingerprint of the version, or the start of it; None is the newest.
            section: section of the config that names the store, for messages.
            hint: command that prepares the store, for the message if it is missing.

        Raises:
            ConfigError: there is no such store or version.
            DataError: it is damaged or has another format.
            StorageError: it cannot be read.
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
        storage.check_sizes({name: info.bytes for name, info in manifest.files.items()})
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
                yield info.bytes, None if is_intact else Damage(file=name, cause=_WRONG_HASH)
        for split, info in self.manifest.splits.items():
            if self.manifest.kind == "images":
                yield from self._verify_blocks(split, IMAGES, info.documents)
            else:
                for name in (TOKENS, MASK) if self.manifest.masked else (TOKENS,):
                    yield from self._verify_blocks(split, name, info.tokens)

    def _verify_blocks(self, split: Split, name: str, num_elements: int) -> Iterator[tuple[int, Damage | None]]:
        """Compares each block of an array with its hash; blocks have `manifest.block` elements, the last one fewer."""
        file, block = f"{split}/{name}", self.manifest.block
        try:
            array, hashes = self.array(split, name), self.read_all(split, name + BLOCKS)
        except DataError as error:
            yield 0, Damage(file=file, cause=str(error))
            return
        starts = np.arange(0, num_elements, block)
        if len(hashes) != len(starts):
            yield 0, Damage(file=file, cause=f"has {len(starts)} blocks, but hashes of {len(hashes)}")
            return
        for first in range(0, len(starts), _VERIFY_BATCH):
            batch = starts[first : first + _VERIFY_BATCH]
            lengths = np.minimum(block, num_elements - batch)
            contents = arrays.read_each(array, f"{self}/{file}", batch.tolist(), lengths.tolist())
            for number, content in enumerate(contents, first):
                if isinstance(content, DataError):
                    yield 0, Damage(file=file, block=number, cause=str(content))
                elif hash_block(content) != int(hashes[number]):
                    yield content.nbytes, Damage(file=file, block=number, cause=_WRONG_HASH)
                else:
                    yield content.nbytes, None

    def read_ranges(self, split: Split, name: str, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Reads ranges of an array of a split, such as `tokens` or `offsets`, concatenated.

        `starts` and `lengths` are int64[N]. DataError if a range is outside the array, or damaged.
        """
        path = f"{self}/{split}/{name}"
        return arrays.read_ranges(self.array(split, name), path, starts.tolist(), lengths.tolist())

    def read_all(self, split: Split, name: str) -> np.ndarray:
        """Reads a whole array; DataError if it is damaged."""
        array = self.array(split, name)
        return arrays.read_ranges(array, f"{self}/{split}/{name}", [0], [array.shape[0]])

    def array(self, split: Split, name: str) -> ts.TensorStore:
        """Opens an array, or returns it if it is open."""
        key = f"{split}/{name}"
        if key not in self._arrays:
            self._arrays[key] = arrays.open_array(self.storage.url_of(key))
        return self._arrays[key]


class TokenStore(Store):
    """A version of a store of text, or of pairs of texts."""

    def __init__(self, storage: ObjectStore, manifest: Manifest):
        """Reads the tokenizer; DataError if it is not the one of the manifest."""
        super().__init__(storage, manifest)
        info = manifest.tokenizer_info
        self._tokenizer_content = storage.read(info.file)
        if hashlib.sha256(self._tokenizer_content).hexdigest() != info.sha256:
            raise DataError(f"{self}/{info.file}: is not the tokenizer of the manifest; {DAMAGED_VERSION_FIX}")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the store."""
        info = self.manifest.tokenizer_info
        return load_tokenizer(info.kind, self._tokenizer_content, info.end_of_document, name=f"{self}/{info.file}")

    def read(self, split: Split, starts: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
        """Reads `length` consecutive tokens from each of `starts`, [N]: [N, length] of the store's type.

        DataError if tokens are outside the split, damaged, or not in the vocabulary.
        """
        starts_N, lengths_N = np.asarray(starts, np.int64), np.full(len(starts), length)
        tokens = self.read_ranges(split, TOKENS, starts_N, lengths_N)
        self._check_ids(split, tokens, starts_N, lengths_N)
        return tokens.reshape(-1, length)

    def read_with_mask(
        self, split: Split, starts: np.ndarray, lengths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Reads ranges of tokens, and of the mask of tokens that count in the loss, as in `read_ranges`.

        Checks ids like `read`. The mask is uint8, and None if the store has none.
        """
        tokens_N = self.read_ranges(split, TOKENS, starts, lengths)
        self._check_ids(split, tokens_N, starts, lengths)
        return tokens_N, self.read_ranges(split, MASK, starts, lengths) if self.manifest.masked else None

    def sample_tokens(self, split: Split, limit: int) -> np.ndarray:
        """Reads all tokens of a split, or about `limit` of them in evenly spaced chunks if it has more."""
        tokens = self.manifest.splits[split].tokens
        if tokens <= limit:
            return self.read(split, [0], tokens)[0]
        num_chunks = max(1, limit // arrays.CHUNK)
        starts = np.arange(num_chunks) * (tokens - arrays.CHUNK) // num_chunks
        return self.read(split, starts, arrays.CHUNK).reshape(-1)

    def offsets(self, split: Split) -> np.ndarray:
        """Reads the first token of each document, and the end of the last document: int64[documents + 1]."""
        return self.read_all(split, OFFSETS)

    def lengths(self, split: Split) -> np.ndarray:
        """Reads the number of tokens of each document, including its end: int64[documents]."""
        return self.read_all(split, LENGTHS)

    def _check_ids(self, split: Split, tokens_N: np.ndarray, starts_P: np.ndarray, lengths_P: np.ndarray) -> None:
        vocab_size = self.manifest.tokenizer_info.vocab_size
        if tokens_N.size and int(tokens_N.max()) >= vocab_size:
            first_bad = int((tokens_N >= vocab_size).argmax())
            # With lengths of 3 and 5, tokens 0 to 2 are in range 0, and tokens 3 to 7 in range 1.
            i = int(np.searchsorted(np.cumsum(lengths_P), first_bad, side="right"))
            raise DataError(
                f"{self}/{split}/{TOKENS}: an id beyond the vocabulary of {vocab_size} in tokens {starts_P[i]} to "
                f"{starts_P[i] + lengths_P[i]}; {DAMAGED_VERSION_FIX}"
            )


def hash_block(values: np.ndarray) -> int:
    """Returns the XXH3 of values as little-endian integers."""
    little_endian = values.astype(values.dtype.newbyteorder("<"), copy=False)
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(little_endian).data)


def hash_files(folder: Path, block_hashed: Sequence[str]) -> dict[str, StoredFile]:
    """Returns length and hash of every file below a folder; no hash for the arrays whose blocks are hashed."""
    prefixes = tuple(f"{split}/{name}/c/" for split in SPLITS for name in block_hashed)
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            digest = None if name.startswith(prefixes) else xxhash.xxh3_128_hexdigest(path.read_bytes())
            files[name] = StoredFile(bytes=path.stat().st_size, digest=digest)
    return files
