"""Which text files make up a corpus, and which of them are held out.

It names and reads files; it neither tokenises nor writes. Invariants: the list of files is sorted by relative
path, and whether a file is held out depends on its relative path alone, so adding a file moves no other file
from one split to the other.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from jaxinfra.config import Problem
from jaxinfra.errors import ConfigError, StorageError

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")

STDLIB = "stdlib"
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__"})
_GLOB = frozenset("*?[")


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The recipe of a token store: its text, its split and its tokenizer.

    Attributes:
        root: folder that holds the files; the word `stdlib` is the running Python's standard library.
        pattern: which files below the root, as in `pathlib.Path.glob`.
        min_bytes: files shorter than this are left out.
        heldout_fraction: expected share of the files that is never trained on, above 0 and below 1.
        vocab_size: largest vocabulary to train; unused when `tokenizer` names an existing one.
        tokenizer: path of an existing tokenizer.json; None trains a byte-level BPE on the training files.
        end_of_document: the special token that closes every document.
    """

    root: str = STDLIB
    pattern: str = "**/*.py"
    min_bytes: int = 1
    heldout_fraction: float = 0.05
    vocab_size: int = 8192
    tokenizer: str | None = None
    end_of_document: str = "<|endoftext|>"

    def problems(self) -> Iterable[Problem]:
        """Yields what is wrong with the recipe itself; files are looked at by `scan`."""
        if not self.root:
            yield Problem(fields=("root",), message="names no folder", fix=f"use root={STDLIB} or a path")
        if not self.pattern or PurePosixPath(self.pattern).is_absolute():
            yield Problem(
                fields=("pattern",),
                message="must be a pattern relative to the root",
                fix="use pattern=**/*.py",
            )
        if not 0 < self.heldout_fraction < 1:
            yield Problem(
                fields=("heldout_fraction",),
                message="must be above 0 and below 1: both splits are needed",
                fix="use heldout_fraction=0.05",
            )
        if self.tokenizer is None and self.vocab_size < 257:
            yield Problem(
                fields=("vocab_size",),
                message="a byte-level vocabulary needs 256 bytes and the end of a document",
                fix="use vocab_size=257 or more",
            )
        if self.min_bytes < 0:
            yield Problem(fields=("min_bytes",), message="must not be negative", fix="use min_bytes=0")
        if not self.end_of_document:
            yield Problem(
                fields=("end_of_document",),
                message="must not be empty",
                fix="use end_of_document=<|endoftext|>",
            )


@dataclass(frozen=True, kw_only=True)
class Source:
    """The files that a scan found.

    Attributes:
        root: the folder that holds them.
        files: names relative to the root, sorted, per split.
        bytes: bytes of text per split.
        not_utf8: files left out because they are not UTF-8.
        fingerprint: hash of the names and contents.
    """

    root: Path
    files: dict[Split, tuple[str, ...]]
    bytes: dict[Split, int]
    not_utf8: tuple[str, ...]
    fingerprint: str

    @property
    def total_bytes(self) -> int:
        """Bytes of text in all splits."""
        return sum(self.bytes.values())

    def texts(self, names: Iterable[str]) -> Iterator[str]:
        """Yields the text of each named file, one in memory at a time; line ends stay as they are."""
        for name in names:
            yield _read(self.root / name).decode()


def root_folder(corpus: Corpus) -> Path:
    """The folder that `corpus.root` stands for.

    Raises:
        ConfigError: there is no such folder.
        StorageError: it may not be read.
    """
    if corpus.root == STDLIB:
        return Path(sysconfig.get_path("stdlib"))
    root = Path(corpus.root).expanduser()
    where = f"data.corpus.root={corpus.root}"
    try:
        with os.scandir(root):
            return root
    except FileNotFoundError:
        raise ConfigError(f"{where}: no such folder; give the folder that holds the text") from None
    except NotADirectoryError:
        raise ConfigError(f"{where}: is a file; give the folder and set data.corpus.pattern") from None
    except PermissionError:
        raise StorageError(f"{where}: permission denied; make the folder readable") from None


def scan(corpus: Corpus) -> Source:
    """Reads every file of the corpus once and says what is there.

    Raises:
        ConfigError: the folder is missing, no file matches, or one of the splits would be empty.
        StorageError: a folder or file may not be read.
    """
    root = root_folder(corpus)
    files: dict[Split, list[str]] = {"train": [], "heldout": []}
    sizes: dict[Split, int] = {"train": 0, "heldout": 0}
    not_utf8: list[str] = []
    digest = hashlib.blake2b(digest_size=16)
    for name in _names(corpus, root):
        content = _read(root / name)
        if len(content) < corpus.min_bytes:
            continue
        try:
            content.decode()
        except UnicodeDecodeError:
            not_utf8.append(name)
            continue
        split: Split = "heldout" if draw(name) < corpus.heldout_fraction else "train"
        files[split].append(name)
        sizes[split] += len(content)
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    _check_splits(corpus, root, files, len(not_utf8))
    return Source(
        root=root,
        files={split: tuple(names) for split, names in files.items()},
        bytes=sizes,
        not_utf8=tuple(not_utf8),
        fingerprint=digest.hexdigest(),
    )


def _names(corpus: Corpus, root: Path) -> list[str]:
    """Sorted relative names of the files that match; a folder that may not be listed is an error."""
    parts = PurePosixPath(corpus.pattern).parts
    fixed = next((i for i, part in enumerate(parts) if _GLOB & set(part)), len(parts) - 1)
    folders = os.walk(root.joinpath(*parts[:fixed]), onerror=_raise_unreadable)
    if "**" in parts:
        for _ in folders:  # `glob` passes over folders that it may not list
            pass
    else:
        next(folders, None)
    found = (path for path in root.glob(corpus.pattern) if path.is_file())
    names = sorted(path.relative_to(root).as_posix() for path in found)
    if corpus.root == STDLIB:
        names = [name for name in names if not _NOT_STDLIB & set(name.split("/"))]
    return names


def _check_splits(corpus: Corpus, root: Path, files: dict[Split, list[str]], not_utf8: int) -> None:
    names = files["train"] + files["heldout"]
    if not names:
        raise ConfigError(
            f"data.corpus.pattern={corpus.pattern}: no UTF-8 file of {corpus.min_bytes} bytes or more "
            f"matches in {root} ({not_utf8} not UTF-8); mend the pattern or data.corpus.root"
        )
    if len(names) == 1:
        raise ConfigError(
            f"data.corpus.pattern={corpus.pattern}: matches one file in {root}, which cannot be both trained on "
            "and held out; cut it into several files or use a wider pattern"
        )
    draws = sorted(map(draw, names))
    if not files["train"]:
        raise ConfigError(
            f"data.corpus.heldout_fraction={corpus.heldout_fraction}: holds out all {len(names)} files, "
            f"none is left to train on; use at most {_floor(draws[-1])}"
        )
    if not files["heldout"]:
        raise ConfigError(
            f"data.corpus.heldout_fraction={corpus.heldout_fraction}: holds out none of {len(names)} files; "
            f"use at least {_floor(draws[0]) + 1e-4:.4f}"
        )


def _floor(draw: float) -> float:
    return int(draw * 10_000) / 10_000


def draw(name: str) -> float:
    """A number in [0, 1) that the name fixes: it decides the split and which files train the tokenizer."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except PermissionError:
        raise StorageError(f"{path}: permission denied; make it readable or leave it out by the pattern") from None
    except FileNotFoundError:
        raise StorageError(f"{path}: vanished while the corpus was read; start again") from None
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror}); check the disk") from error


def _raise_unreadable(error: OSError) -> None:
    if isinstance(error, PermissionError):
        raise StorageError(f"{error.filename}: permission denied; make the folder readable")
