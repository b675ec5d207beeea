"""The manifest of a checkpoint: the hash of every file, and what the checkpoint is.

`manifest.json` is written last, and contains a hash of itself. So a step is complete if it has a manifest, and intact
if all its files have the hashes in it. The hash is XXH3-128: it finds damage, not forgery.

A file is hashed in blocks of `BLOCK_BYTES`, in several threads; several processes may share the blocks. Imports neither
JAX nor Orbax.
"""

import errno
import json
import os
from collections.abc import Buffer, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Self

import xxhash

MANIFEST_FILE = "manifest.json"
BLOCK_BYTES = 64 << 20
"""Bytes of a file that have a hash of their own."""

_FORMAT = 1
_READ_BYTES = 1 << 20  # stays in the cache of a core until it is hashed
_THREADS = min(16, os.cpu_count() or 1)
# The storage fails, which says nothing about the file. Other errors of the system (EIO) are those of a damaged disk.
_STORAGE_FAILS = {errno.EACCES, errno.EPERM, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.ENOMEM}


class DamageError(Exception):
    """A file of a checkpoint is missing or damaged; the message names it, relative to the checkpoint."""


class FileHash(NamedTuple):
    """The length of a file in bytes, and the hashes of its blocks."""

    num_bytes: int
    blocks: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Holds the contents of `manifest.json`.

    Attributes:
        step: number of completed steps.
        saved: when it was saved, in UTC, for people.
        leaves: type of each leaf of the state by name, such as "float32[8,128]".
        record: the run record: config, data, versions, devices.
        metrics: of the evaluation after this step; empty without one.
        files: hash of each file by its path in the checkpoint.
    """

    step: int
    saved: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    leaves: Mapping[str, str]
    record: Mapping[str, Any]
    metrics: Mapping[str, float] = field(default_factory=dict)
    files: Mapping[str, FileHash]

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(each.num_bytes for each in self.files.values())

    @property
    def digest(self) -> str:
        """A hash of the manifest, and so of every byte of the checkpoint."""
        return hash_json(self._content())

    def encode(self) -> bytes:
        """Returns the content of the file."""
        return (json.dumps({"hash": self.digest, **self._content()}, indent=1) + "\n").encode()

    def _content(self) -> dict[str, Any]:
        return {"format": _FORMAT, **asdict(self), "files": {name: [*each] for name, each in self.files.items()}}

    @classmethod
    def decode(cls, content: bytes, step: int) -> Self:
        """Parses a file; raises DamageError if it is damaged, of another step, or of another format."""
        try:
            values = json.loads(content)
            expected = values.pop("hash")
            version = values.pop("format")
        except (ValueError, KeyError, AttributeError, TypeError):
            raise DamageError(f"{MANIFEST_FILE} is damaged") from None
        if version != _FORMAT:
            raise DamageError(f"{MANIFEST_FILE} has format {version}, this version of jaxinfra reads {_FORMAT}")
        if expected != hash_json({"format": version, **values}):
            raise DamageError(f"{MANIFEST_FILE} is damaged")
        if values["step"] != step:
            raise DamageError(f"{MANIFEST_FILE} is of step {values['step']}")
        files = {name: FileHash(num_bytes, tuple(blocks)) for name, (num_bytes, blocks) in values.pop("files").items()}
        return cls(files=files, **values)


def read_manifest(folder: Path, step: int) -> Manifest:
    """Reads the manifest of a checkpoint on a disk; raises DamageError if it is missing or damaged."""
    with _reading(MANIFEST_FILE):
        content = (folder / MANIFEST_FILE).read_bytes()
    return Manifest.decode(content, step)


def check_sizes(folder: Path, manifest: Manifest, names: Iterable[str]) -> dict[str, DamageError]:
    """Returns what is wrong with the files that are missing or have another length, by name; reads none."""
    found: dict[str, DamageError] = {}
    for name in names:
        try:
            with _reading(name):
                _check_size(name, manifest.files[name], (folder / name).stat().st_size)
        except DamageError as damage:
            found[name] = damage
    return found


def hash_files(folder: Path, names: Iterable[str]) -> dict[str, FileHash]:
    """Reads files and returns the hash of each by name."""
    sizes = {name: (folder / name).stat().st_size for name in names}
    blocks = [(name, index) for name, size in sizes.items() for index in range(_num_blocks(size))]
    found: dict[str, list[str]] = {name: [] for name in sizes}
    for (name, _), digest in zip(blocks, in_threads(lambda block: _read_block(folder, *block), blocks), strict=True):
        found[name].append(digest)
    return {name: FileHash(size, tuple(found[name])) for name, size in sizes.items()}


def verify_files(folder: Path, manifest: Manifest, names: Iterable[str], *, part: int = 0, of: int = 1) -> None:
    """Reads files, or this part of them, and raises DamageError for the first that differs from the manifest."""
    for _, _, damage in compare_files(folder, manifest, names, part=part, of=of):
        if damage is not None:
            raise damage


def compare_files(
    folder: Path, manifest: Manifest, names: Iterable[str], *, part: int = 0, of: int = 1
) -> Iterator[tuple[str, int, DamageError | None]]:
    """Reads files, or this part of them; yields name, bytes and what is wrong, if anything, of each block.

    Those that are missing, or have another length, come first and are not read.
    """
    names = [*names]
    damaged = check_sizes(folder, manifest, names)
    yield from ((name, 0, damage) for name, damage in damaged.items())
    sound = [name for name in names if name not in damaged]
    blocks = [(name, index) for name in sound for index in range(len(manifest.files[name].blocks))][part::of]

    def compare(block: tuple[str, int]) -> tuple[str, int, DamageError | None]:
        name, index = block
        num_bytes = min(BLOCK_BYTES, manifest.files[name].num_bytes - index * BLOCK_BYTES)
        try:
            check_block(name, index, _read_block(folder, name, index), manifest)
        except DamageError as damage:
            return name, num_bytes, damage
        return name, num_bytes, None

    yield from in_threads(compare, blocks)


def check_block(name: str, index: int, digest: str, manifest: Manifest) -> None:
    """Raises DamageError if a block of a file has another hash."""
    if digest != manifest.files[name].blocks[index]:
        where = f" in bytes {index * BLOCK_BYTES:,} and following" if len(manifest.files[name].blocks) > 1 else ""
        raise DamageError(f"{name} is damaged{where}")


def hash_bytes(content: Buffer) -> FileHash:
    """Returns the hash of a file with this content."""
    view = memoryview(content)
    blocks = (view[i * BLOCK_BYTES : (i + 1) * BLOCK_BYTES] for i in range(_num_blocks(len(view))))
    return FileHash(len(view), tuple(xxhash.xxh3_128_hexdigest(block) for block in blocks))


def verify_bytes(name: str, content: bytes, manifest: Manifest) -> None:
    """Raises DamageError if a file has another content than the manifest says."""
    expected = manifest.files[name]
    _check_size(name, expected, len(content))
    for index, digest in enumerate(hash_bytes(content).blocks):
        check_block(name, index, digest, manifest)


def encode_hashes(hashes: Mapping[str, FileHash]) -> bytes:
    """Encodes hashes that one process passes on to another."""
    return json.dumps(hashes).encode()


def decode_hashes(content: bytes) -> dict[str, FileHash]:
    """Inverts `encode_hashes`."""
    return {name: FileHash(num_bytes, tuple(blocks)) for name, (num_bytes, blocks) in json.loads(content).items()}


def hash_json(content: Mapping[str, Any]) -> str:
    """Returns the hash of a JSON object, whatever the order of its keys."""
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def _num_blocks(num_bytes: int) -> int:
    return -(-num_bytes // BLOCK_BYTES)


def _check_size(name: str, expected: FileHash, num_bytes: int) -> None:
    if num_bytes != expected.num_bytes:
        raise DamageError(f"{name} has {num_bytes:,} bytes, expected {expected.num_bytes:,}")


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Raises DamageError if a file cannot be read; the error of the system passes if the storage fails."""
    try:
        yield
    except OSError as error:
        if error.errno in _STORAGE_FAILS:
            raise
        is_missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        raise DamageError(f"{name} is missing" if is_missing else f"{name}: {error.strerror}") from error


def _read_block(folder: Path, name: str, index: int) -> str:
    digest, left, buffer = xxhash.xxh3_128(), BLOCK_BYTES, memoryview(bytearray(_READ_BYTES))
    with _reading(name), (folder / name).open("rb", buffering=0) as file:
        file.seek(index * BLOCK_BYTES)
        while left and (count := file.readinto(buffer[: min(left, _READ_BYTES)])):
            digest.update(buffer[:count])
            left -= count
    return digest.hexdigest()


def in_threads[A, B](call: Callable[[A], B], arguments: Sequence[A], limit: int = _THREADS) -> Iterator[B]:
    """Yields the results in order; hashing and reading release the GIL."""
    threads = min(len(arguments), limit)
    if threads < 2:
        yield from map(call, arguments)
        return
    with ThreadPoolExecutor(threads) as pool:
        try:
            yield from pool.map(call, arguments)
        finally:
            pool.shutdown(cancel_futures=True)
