"""From a corpus to a token store: train the tokenizer, tokenise, write, measure the baselines, publish.

All work happens in a hidden folder beside the store, which gets the store's name only when the manifest is
written. So a store is whole or not there, whatever ends the process. An existing store is never changed.
"""

import fcntl
import os
import platform
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
from etils import epath

from jaxinfra.data.baseline import HELDOUT_LIMIT_TOKENS, TRAIN_LIMIT_TOKENS, ngram_bits_per_byte, xz_bits_per_byte
from jaxinfra.data.contract import Progress
from jaxinfra.data.corpus import SPLITS, Corpus, Source, Split, draw, scan
from jaxinfra.data.manifest import FILE_NAME, Baselines, FileInfo, Manifest, SplitInfo, check_recipe
from jaxinfra.data.store import TOKENIZER, SplitWriter, TokenStore, hash_files, token_dtype
from jaxinfra.data.tokenizer import Tokenizer, TokenizerFile, load, train_bpe
from jaxinfra.errors import ConfigError, StorageError

TOKENIZER_BYTES = 12_000_000
"""Text that a tokenizer is trained on: more changes an 8k vocabulary little and costs time and memory."""
_BATCH_BYTES = 4_000_000
_BYTES_PER_TOKEN = 2  # low for a trained vocabulary, which has 3 to 4; so the estimate of the space is high


def prepare(corpus: Corpus, out: str | Path, progress: Progress | None = None) -> Manifest:
    """Makes the token store `out`, or returns at once when it is already made from the same files.

    Memory grows with the number of files and with the largest one, which is one document. Beyond that it does
    not grow with the text: the tokenizer and the baselines get no more of it than their limits say.

    Args:
        corpus: the recipe.
        out: local folder of the store; its parents are made.
        progress: told about the steps on the way.

    Raises:
        ConfigError: the recipe does not work, or `out` holds something else; nothing is changed.
        StorageError: a file cannot be read, or the store cannot be written.
        DataError: `out` is a damaged store.
    """
    if "://" in str(out):
        raise ConfigError(f"data.store={out}: a store is prepared in a local folder; copy it there afterwards")
    folder = Path(out).expanduser().absolute()
    tell = progress or (lambda stage, done, total: None)
    source = scan(corpus)
    if _is_occupied(folder):
        return _existing(corpus, source, folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _workspace(folder) as work:
            manifest = _build(corpus, source, work, tell)
            os.rename(work, folder)
    except OSError as error:
        free = f", {_free_bytes(folder.parent):,} bytes free" if folder.parent.exists() else ""
        raise StorageError(f"data.store={folder}: {error.strerror}{free}; mend it or choose another place") from error
    return manifest


def _build(corpus: Corpus, source: Source, work: Path, tell: Progress) -> Manifest:
    """Fills the work folder, the manifest last."""
    tell("tokenizer", 0, source.total_bytes)
    tokenizer = _tokenizer(corpus, source)
    _check_space(work, source, token_dtype(tokenizer.vocab_size))
    tokenizer.save(work / TOKENIZER)
    splits = {}
    done = 0
    for split in SPLITS:
        writer = SplitWriter(work, split, vocab_size=tokenizer.vocab_size, eot_id=tokenizer.eot_id)
        for texts in _batches(source.texts(source.files[split])):
            tell("tokens", done, source.total_bytes)
            sizes = [len(text.encode()) for text in texts]
            writer.add(zip(tokenizer.encode_batch(texts), sizes, strict=True))
            done += sum(sizes)
        splits[split] = writer.close()
    manifest = _describe(corpus, source, tokenizer, splits, hash_files(work))
    tell("baselines", done, source.total_bytes)
    manifest = replace(manifest, baselines=_baselines(manifest, source, work))
    manifest.write(work)
    tell("done", done, source.total_bytes)
    return manifest


def _tokenizer(corpus: Corpus, source: Source) -> Tokenizer:
    if corpus.tokenizer is not None:
        return load(TokenizerFile(path=corpus.tokenizer, end_of_document=corpus.end_of_document))
    names = sorted(source.files["train"], key=draw)  # a fair sample, the same whatever else is in the folder
    texts = _first_bytes(source.texts(names), TOKENIZER_BYTES)
    return train_bpe(texts, vocab_size=corpus.vocab_size, end_of_document=corpus.end_of_document)


def _describe(
    corpus: Corpus,
    source: Source,
    tokenizer: Tokenizer,
    splits: dict[Split, SplitInfo],
    files: dict[str, FileInfo],
) -> Manifest:
    packages = {name: version(name) for name in ("tokenizers", "tensorstore", "numpy")}
    return Manifest(
        corpus=corpus,
        source_fingerprint=source.fingerprint,
        source_files={split: len(names) for split, names in source.files.items()},
        not_utf8=source.not_utf8,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eot_id=tokenizer.eot_id,
        dtype=token_dtype(tokenizer.vocab_size).name,
        splits=splits,
        files=files,
        baselines=Baselines(xz_bits_per_byte=None, ngram_bits_per_byte=None),
        versions=packages | {"python": platform.python_version()},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _baselines(manifest: Manifest, source: Source, work: Path) -> Baselines:
    """Measures both on the same documents: the first held-out ones within the limit, but at least one."""
    store = TokenStore(epath.Path(work), manifest)
    offsets = store.offsets("heldout")
    documents = max(1, int(np.searchsorted(offsets, HELDOUT_LIMIT_TOKENS, side="right")) - 1)
    names = source.files["heldout"][:documents]
    heldout_bytes = sum(len(text.encode()) for text in source.texts(names))
    if not heldout_bytes:  # nothing but empty files
        return Baselines(xz_bits_per_byte=None, ngram_bits_per_byte=None)
    return Baselines(
        xz_bits_per_byte=xz_bits_per_byte(source.texts(names)),
        ngram_bits_per_byte=ngram_bits_per_byte(
            store.sample("train", TRAIN_LIMIT_TOKENS),
            store.read("heldout", [0], int(offsets[documents]))[0],
            heldout_bytes=heldout_bytes,
            vocab_size=manifest.vocab_size,
            eot_id=manifest.eot_id,
        ),
    )


def _existing(corpus: Corpus, source: Source, folder: Path) -> Manifest:
    """The manifest of the store that is there, if it is the one asked for."""
    if not (folder / FILE_NAME).exists():
        raise ConfigError(f"data.store={folder}: holds something that is no token store; choose an empty place")
    manifest = TokenStore.open(folder).manifest
    check_recipe(manifest, corpus, str(folder))
    other = f"delete {folder} to prepare it again, or choose another data.store"
    if manifest.source_fingerprint != source.fingerprint:
        raise ConfigError(f"data.store={folder}: the files in {source.root} have changed since it was made; {other}")
    if corpus.tokenizer is not None and _tokenizer(corpus, source).sha256 != manifest.tokenizer_sha256:
        raise ConfigError(f"data.store={folder}: {corpus.tokenizer} has changed since it was made; {other}")
    return manifest


@contextmanager
def _workspace(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder`, held by a lock; what is left in it is swept by the next call."""
    work = folder.with_name(f".{folder.name}.partial")
    work.mkdir(exist_ok=True)
    lock = os.open(work, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"data.store={folder}: another process is preparing it; wait for that one") from None
        try:
            for left in work.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)
    finally:
        os.close(lock)


def _check_space(work: Path, source: Source, dtype: np.dtype) -> None:
    needed = source.total_bytes * dtype.itemsize // _BYTES_PER_TOKEN
    free = _free_bytes(work)
    if free < needed:
        raise StorageError(
            f"data.store: {work.parent} has {free:,} bytes free, the store needs about {needed:,}; "
            "free some space or choose another place"
        )


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _is_occupied(folder: Path) -> bool:
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Groups texts so that each group has at least `_BATCH_BYTES` characters, the last one perhaps less."""
    texts = iter(texts)
    for first in texts:
        yield [first, *_first_bytes(texts, _BATCH_BYTES - len(first))]


def _first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    """Yields texts until they have `limit` characters together."""
    for text in texts if limit > 0 else ():
        yield text
        limit -= len(text)
        if limit <= 0:
            return


def facts(manifest: Manifest) -> list[str]:
    """What a store holds and what there is to beat, line by line."""
    baselines = manifest.baselines
    lines = [
        f"tokenizer  {manifest.vocab_size} words, {manifest.bytes_per_token('train'):.2f} bytes a token",
    ]
    for split in SPLITS:
        info = manifest.splits[split]
        lines.append(f"{split:<9}  {info.documents} documents, {info.tokens} tokens, {info.bytes} bytes")
    if baselines.xz_bits_per_byte is not None and baselines.ngram_bits_per_byte is not None:
        lines.append(
            f"to beat    {baselines.xz_bits_per_byte:.3f} bits a byte by xz -6, "
            f"{baselines.ngram_bits_per_byte:.3f} by a 5-gram over tokens"
        )
    return lines
