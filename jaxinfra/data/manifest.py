"""What a token store says of itself: `manifest.json`, written last, so that a store without one is no store.

It holds the recipe, the counts, the hash of every file and the baselines. It knows nothing of arrays.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxinfra.config import decode, diff, encode
from jaxinfra.data.corpus import Corpus, Split
from jaxinfra.errors import ConfigError, DataError

FORMAT = 1
FILE_NAME = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """What one split holds.

    Attributes:
        tokens: number of token ids, each document with its end.
        documents: number of documents.
        bytes: bytes of text.
        digest: BLAKE2b of the token ids as little-endian integers of the store's type.
    """

    tokens: int
    documents: int
    bytes: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    """Length and hash of one file of the store."""

    bytes: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class Baselines:
    """How well simple models know the held-out text, in bits per byte; None where it has no bytes.

    Attributes:
        xz_bits_per_byte: of a general compressor.
        ngram_bits_per_byte: of an n-gram over tokens.
    """

    xz_bits_per_byte: float | None
    ngram_bits_per_byte: float | None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that is known of a store without opening its arrays.

    Attributes:
        corpus: the recipe that it was made from.
        source_fingerprint: hash of the names and contents of the files that went in.
        source_files: number of those files per split.
        not_utf8: files left out because they are not UTF-8.
        tokenizer_sha256: hash of the tokenizer.json.
        vocab_size: one more than the largest token id.
        eot_id: the token that ends a document.
        dtype: integer type of the token ids.
        splits: what each split holds.
        files: length and hash of every other file, by name relative to the store.
        baselines: what a trained model has to beat.
        versions: of Python and the packages that made the store.
        created: when it was made, in UTC.
    """

    corpus: Corpus
    source_fingerprint: str
    source_files: dict[Split, int]
    not_utf8: tuple[str, ...]
    tokenizer_sha256: str
    vocab_size: int
    eot_id: int
    dtype: str
    splits: dict[Split, SplitInfo]
    files: dict[str, FileInfo]
    baselines: Baselines
    versions: dict[str, str]
    created: str

    @property
    def fingerprint(self) -> str:
        """Hash of what a model can see of the store: equal fingerprints give equal batches."""
        seen = [self.tokenizer_sha256, self.eot_id, self.dtype]
        seen += [[name, info.digest, info.tokens] for name, info in sorted(self.splits.items())]
        return _digest(seen)

    def bytes_per_token(self, split: Split) -> float:
        """Mean bytes of text that a token of the split stands for, ends of documents counted as tokens."""
        return self.splits[split].bytes / max(1, self.splits[split].tokens)

    def write(self, folder: Path) -> None:
        """Writes the file under its final name at once: to a temporary name, synced, then renamed."""
        tree = asdict(self) | {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "corpus": encode(self.corpus),
        }
        tree["digest"] = _digest(tree)
        partial = folder / (FILE_NAME + ".partial")
        with partial.open("w", encoding="utf-8") as file:
            json.dump(tree, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        partial.rename(folder / FILE_NAME)


def parse(content: bytes, path: str) -> Manifest:
    """Reads the content of a manifest; `path` is for the error.

    Raises:
        DataError: it is damaged, or of a format that this version does not know.
    """
    try:
        tree: dict[str, Any] = json.loads(content)
        found, digest = tree["format"], tree.pop("digest")
        if found != FORMAT:
            raise DataError(
                f"{path}: store format {found}, this version reads format {FORMAT}; "
                "update jaxinfra or prepare the store again"
            )
        if digest != _digest(tree):
            raise ValueError("its digest does not fit its contents")
        del tree["format"], tree["fingerprint"]
        return Manifest(**tree | _typed(tree))
    except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        cause = f"{type(error).__name__}: {error}"
        raise DataError(f"{path}: damaged manifest ({cause}); prepare the store again") from None


def check_recipe(manifest: Manifest, corpus: Corpus, path: str) -> None:
    """Refuses a store that was made from another recipe than the one that is asked for.

    Raises:
        ConfigError: the recipes differ; the message has both values of each field that does.
    """
    differences = diff(manifest.corpus, corpus)
    if differences:
        shown = ", ".join(f"data.corpus.{each.path}={each.left!r} there, {each.right!r} here" for each in differences)
        raise ConfigError(f"data.store={path}: was made from another recipe ({shown}); choose another data.store")


def _digest(tree: Any) -> str:
    return hashlib.blake2b(json.dumps(tree, sort_keys=True).encode(), digest_size=16).hexdigest()


def _typed(tree: dict[str, Any]) -> dict[str, Any]:
    """The parts of a manifest that are more than JSON values."""
    return {
        "corpus": decode(Corpus, tree["corpus"]),
        "not_utf8": tuple(tree["not_utf8"]),
        "splits": {name: SplitInfo(**info) for name, info in tree["splits"].items()},
        "files": {name: FileInfo(**info) for name, info in tree["files"].items()},
        "baselines": Baselines(**tree["baselines"]),
    }
