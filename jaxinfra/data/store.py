"""A token store: the tokens of a corpus in one folder, written once and never changed.

    manifest.json            what is in it; written last
    tokenizer.json           how to read it
    {train,heldout}/tokens   zarr 3, uint16 or uint32: all documents, each closed by the end-of-document token
    {train,heldout}/offsets  zarr 3, int64[documents + 1]: where each document starts, and the end

Invariants: a folder without a manifest is no store; whatever is damaged, short or missing is an error that
names the file, never a silent zero. `SplitWriter` fills a folder; it does not decide where the folder is.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from etils import epath

from jaxinfra.data import arrays
from jaxinfra.data import manifest as manifests
from jaxinfra.data.corpus import SPLITS, Split
from jaxinfra.data.manifest import FileInfo, Manifest, SplitInfo
from jaxinfra.data.tokenizer import Tokenizer, restore
from jaxinfra.errors import ConfigError, DataError, StorageError

PREPARE = "python -m launch prepare CONFIG"
TOKENIZER = "tokenizer.json"
_TOKENS = "tokens"
_OFFSETS = "offsets"
_READ_BYTES = 1024 * 1024
_PIECE = arrays.CHUNK


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest type that holds the vocabulary and one value more, which marks what was never written."""
    return np.dtype(np.uint16 if vocab_size < 2**16 else np.uint32)


class TokenStore:
    """A store opened for reading; safe to read from many threads."""

    def __init__(self, path: epath.Path, manifest: Manifest):
        self.path = path
        self.manifest = manifest
        self.tokenizer = _read_tokenizer(path / TOKENIZER, manifest)
        self._context = arrays.cache_context()
        self._arrays = {
            (split, name): arrays.open_array(str(path / split / name), self._context)
            for split in SPLITS
            for name in (_TOKENS, _OFFSETS)
        }
        for split, info in manifest.splits.items():
            self._check_length(split, _TOKENS, info.tokens)
            self._check_length(split, _OFFSETS, info.documents + 1)

    @classmethod
    def open(cls, path: str | Path | epath.Path, *, fix: str = PREPARE) -> "TokenStore":
        """Opens a store and checks its manifest, its tokenizer and the length of every file.

        Args:
            path: the folder.
            fix: the command that makes the store, for the error when there is none.

        Raises:
            ConfigError: there is no store.
            DataError: it is damaged or of a newer format.
            StorageError: it may not be read.
        """
        folder = epath.Path(path).expanduser()
        manifest_path = folder / manifests.FILE_NAME
        try:
            if not manifest_path.exists():
                raise ConfigError(f"data.store={path}: no token store there; make it with: {fix}")
            manifest = manifests.parse(manifest_path.read_bytes(), str(manifest_path))
            for name, info in manifest.files.items():
                _check_file(folder / name, info)
            return cls(folder, manifest)
        except OSError as error:
            raise _unreadable(folder, error) from None

    def read(self, split: Split, starts: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
        """Reads windows of consecutive tokens.

        Args:
            split: which split.
            starts: first token of each window, int64[N].
            length: tokens of a window.

        Returns:
            Tokens [N, length] of the store's type.

        Raises:
            DataError: a window lies outside the split, or what is read is damaged.
        """
        starts = np.asarray(starts, np.int64)
        tokens = self.manifest.splits[split].tokens
        outside = (starts < 0) | (starts + length > tokens)
        if outside.any():
            first = int(starts[outside][0])
            raise DataError(
                f"{self.path / split / _TOKENS}: asked for tokens {first} to {first + length}, has {tokens}"
            )
        window_NL = self._read(split, _TOKENS, starts, length)
        if window_NL.size and int(window_NL.max()) >= self.manifest.vocab_size:
            row = int((window_NL >= self.manifest.vocab_size).any(axis=1).argmax())
            raise DataError(
                f"{self.path / split / _TOKENS}: an id beyond the vocabulary of {self.manifest.vocab_size} "
                f"in tokens {starts[row]} to {starts[row] + length}; copy the store anew"
            )
        return window_NL

    def sample(self, split: Split, limit: int) -> np.ndarray:
        """All tokens of a split, or about `limit` of them in evenly spaced pieces if it has more."""
        tokens = self.manifest.splits[split].tokens
        if tokens <= limit:
            return self.read(split, [0], tokens)[0]
        pieces = max(1, limit // _PIECE)
        return self.read(split, np.arange(pieces) * (tokens - _PIECE) // pieces, _PIECE).reshape(-1)

    def offsets(self, split: Split) -> np.ndarray:
        """Where each document starts, and the end of the last: int64[documents + 1]."""
        length = self.manifest.splits[split].documents + 1
        return self._read(split, _OFFSETS, np.zeros(1, np.int64), length)[0]

    def verify(self) -> None:
        """Reads every file and compares it with its hash in the manifest.

        Raises:
            DataError: a file is damaged; the message names it.
            StorageError: it may not be read.
        """
        for name, info in self.manifest.files.items():
            path = self.path / name
            try:
                _check_file(path, info)
                digest = _hash_file(path)
            except OSError as error:
                raise _unreadable(path, error) from None
            if digest != info.digest:
                raise DataError(f"{path}: does not fit its hash in the manifest; copy the store anew")

    def _read(self, split: Split, name: str, starts: np.ndarray, length: int) -> np.ndarray:
        path = str(self.path / split / name)
        return arrays.read_windows(self._arrays[split, name], path, starts.tolist(), length)

    def _check_length(self, split: Split, name: str, expected: int) -> None:
        found = self._arrays[split, name].shape[0]
        if found != expected:
            raise DataError(f"{self.path / split / name}: {found} elements, the manifest has {expected}; copy it anew")


class SplitWriter:
    """Appends documents to one split of an empty folder; holds about one shard of tokens in memory."""

    def __init__(self, folder: Path, split: Split, *, vocab_size: int, eot_id: int):
        self._dtype = token_dtype(vocab_size)
        self._eot_id = eot_id
        self._tokens_path = str(folder / split / _TOKENS)
        self._offsets_path = str(folder / split / _OFFSETS)
        self._array = arrays.create(self._tokens_path, self._dtype, int(np.iinfo(self._dtype).max))
        self._digest = hashlib.blake2b(digest_size=16)
        self._waiting: list[np.ndarray] = []
        self._waiting_tokens = 0
        self._lengths: list[int] = []
        self._bytes = 0

    def add(self, documents: Iterable[tuple[Sequence[int], int]]) -> None:
        """Appends documents, each as its token ids without the end and its bytes of text."""
        for ids, size_bytes in documents:
            tokens = np.empty(len(ids) + 1, self._dtype)
            tokens[:-1] = ids
            tokens[-1] = self._eot_id
            self._waiting.append(tokens)
            self._waiting_tokens += len(tokens)
            self._lengths.append(len(tokens))
            self._bytes += size_bytes
            if self._waiting_tokens >= arrays.SHARD:
                self._flush(whole_shards=True)

    def close(self) -> SplitInfo:
        """Writes what is left and says what the split holds."""
        self._flush(whole_shards=False)
        offsets = np.concatenate([[0], np.cumsum(self._lengths, dtype=np.int64)])
        arrays.append(arrays.create(self._offsets_path, np.dtype(np.int64), -1), self._offsets_path, offsets)
        return SplitInfo(
            tokens=int(offsets[-1]),
            documents=len(self._lengths),
            bytes=self._bytes,
            digest=self._digest.hexdigest(),
        )

    def _flush(self, *, whole_shards: bool) -> None:
        tokens = np.concatenate([np.empty(0, self._dtype), *self._waiting])
        cut = len(tokens) // arrays.SHARD * arrays.SHARD if whole_shards else len(tokens)
        if cut:
            self._array = arrays.append(self._array, self._tokens_path, tokens[:cut])
            self._digest.update(tokens[:cut].astype(self._dtype.newbyteorder("<")).tobytes())
        self._waiting, self._waiting_tokens = [tokens[cut:]], len(tokens) - cut


def _unreadable(path: epath.Path, error: OSError) -> StorageError:
    return StorageError(f"{path}: cannot be read ({error.strerror or error}); mend the access")


def hash_files(folder: Path) -> dict[str, FileInfo]:
    """Length and hash of every file below a folder, by relative name."""
    return {
        path.relative_to(folder).as_posix(): FileInfo(bytes=path.stat().st_size, digest=_hash_file(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _hash_file(path: Path | epath.Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _read_tokenizer(path: epath.Path, manifest: Manifest) -> Tokenizer:
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != manifest.tokenizer_sha256:
        raise DataError(f"{path}: is not the tokenizer that made the store; copy the store anew")
    return restore("tokenizer_json", content, manifest.corpus.end_of_document, str(path))


def _check_file(path: epath.Path, info: FileInfo) -> None:
    if not path.exists():
        raise DataError(f"{path}: missing; prepare the store again or copy it anew")
    found = path.stat().length
    if found != info.bytes:
        raise DataError(
            f"{path}: {found} bytes, the manifest says {info.bytes}; prepare the store again or copy it anew"
        )
