"""One job of preparing: read some pieces of a source, make documents, tokenise them, commit a part.

It is the same function on every engine. A part depends on its job alone, so it does not matter who makes it, when, or
how often.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from jaxinfra.data.store.manifest import SPLITS, Split, TokenizerInfo
from jaxinfra.data.store.store import token_dtype
from jaxinfra.data.tokenizer import Tokenizer, restore
from jaxinfra.errors import DataError
from jaxinfra.prepare import parts
from jaxinfra.prepare.builders.bad_records import BadRecords
from jaxinfra.prepare.documents.dedup import Signer
from jaxinfra.prepare.documents.document import Document, RecordError
from jaxinfra.prepare.documents.encoding import encode_documents
from jaxinfra.prepare.parts import Note, Part
from jaxinfra.prepare.recipes.corpus import Corpus, draw
from jaxinfra.prepare.sources.record import Bad, Found, Piece

_BATCH_CHARS = 1_000_000
_PIECE_CHARS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one worker does at a time.

    Attributes:
        number: of the part that it makes.
        pieces: what it reads.
        corpus: the recipe.
        folder: for parts.
        tokenizer: its file in that folder, and what it is.
    """

    number: int
    pieces: tuple[Piece, ...]
    corpus: Corpus
    folder: str
    tokenizer: TokenizerInfo


def tokenise(job: Job) -> Note:
    """Makes and commits the part of a job.

    Raises:
        DataError: a record cannot be read and the recipe does not skip it; nothing is committed.
        StorageError: the source cannot be read.
        OSError: the part cannot be written.
    """
    source, folder = job.corpus.source, Path(job.folder)
    records = (record for piece in job.pieces for record in source.read(piece))
    tokenizer = load_tokenizer(folder / job.tokenizer.file, job.tokenizer)
    part = make_part(job.corpus, tokenizer, records, read_bytes=sum(piece.size_bytes for piece in job.pieces))
    return parts.write(folder, job.number, part)


@lru_cache(maxsize=2)
def load_tokenizer(path: Path, info: TokenizerInfo) -> Tokenizer:
    """The tokenizer in a file; a worker reads it once."""
    return restore(info.kind, path.read_bytes(), info.end_of_document, name=str(path))


def make_part(corpus: Corpus, tokenizer: Tokenizer, records: Iterable[Found | Bad], *, read_bytes: int) -> Part:
    """Makes a part of records, in their order.

    Raises:
        DataError: a record cannot be read and the recipe does not skip it.
    """
    kept = _Kept(corpus)
    rows: dict[Split, _Rows] = {split: _Rows(corpus, tokenizer) for split in SPLITS}
    for split, group in kept.groups(records):
        rows[split].add(group)
    splits: dict[Split, dict[str, np.ndarray]] = {split: each.finish() for split, each in rows.items()}
    return Part(
        splits=splits,
        tokens=sum(len(arrays["tokens_N"]) for arrays in splits.values()),
        records=kept.records,
        read_bytes=read_bytes,
        skipped=tuple(kept.bad.found),
        filtered=dict(kept.filtered),
    )


class _Kept:
    """Which records become documents, and a count of those that do not."""

    def __init__(self, corpus: Corpus):
        self.corpus, self.records = corpus, 0
        self.bad = BadRecords(corpus.on_bad)
        self.filtered = Counter[str]()

    def groups(self, records: Iterable[Found | Bad]) -> Iterator[tuple[Split, Sequence[Document]]]:
        """The split and the documents of each record that is kept."""
        for each in records:
            self.records += 1
            if isinstance(each, Bad):
                self.bad.add(each.where, each.cause)
                continue
            try:
                group = self.corpus.form.documents(each.record)
            except RecordError as error:
                self.bad.add(each.where, str(error))
                continue
            reasons = (self.corpus.filters.reason(text_of([document])) for document in group)
            reason = next(filter(None, reasons), None)
            if reason is None:
                yield "heldout" if draw(each.key) < self.corpus.heldout_fraction else "train", group
            else:
                self.filtered[reason] += 1


class _Rows:
    """Documents of one split, tokenised in batches."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer):
        self._masked, self._dedup = corpus.form.masked, corpus.dedup
        self._sign = None if corpus.dedup is None else Signer(corpus.dedup)
        self._tokenizer, self._dtype = tokenizer, token_dtype(tokenizer.vocab_size)
        self._waiting: list[Document] = []
        self._waiting_chars = 0
        self._tokens: list[np.ndarray] = []
        self._mask: list[np.ndarray] = []
        self._lengths: list[int] = []
        self._bytes: list[int] = []
        self._exact: list[np.ndarray] = []
        self._near: list[np.ndarray] = []

    def add(self, group: Sequence[Document]) -> None:
        """Takes the documents of a record."""
        if self._sign is not None:
            exact, near = self._sign(text_of(group))
            self._exact += [exact] * len(group)
            self._near += [near] * len(group) if near is not None else []
        self._waiting += group
        self._waiting_chars += sum(len(span.text) for document in group for span in document)
        if self._waiting_chars >= _BATCH_CHARS:
            self._encode()

    def finish(self) -> dict[str, np.ndarray]:
        """The arrays of a part, D documents with N tokens.

        Returns:
            `tokens_N`: ids, each document with its end; `lengths_D`, `bytes_D`: tokens and bytes of text of each,
            int64; where some are not learned `mask_N`, uint8, 1 for those that are; where duplicates are looked for
            `exact_D2`, the hash of each text, uint64, and `near_DP`, its MinHash.
        """
        self._encode()
        arrays = {
            "tokens_N": np.concatenate([np.empty(0, self._dtype), *self._tokens]),
            "lengths_D": np.array(self._lengths, np.int64),
            "bytes_D": np.array(self._bytes, np.int64),
        }
        if self._masked:
            arrays["mask_N"] = np.concatenate([np.empty(0, np.uint8), *self._mask])
        if self._sign is not None:
            arrays["exact_D2"] = np.array(self._exact, np.uint64).reshape(-1, 2)
            if self._dedup is not None and self._dedup.near:
                arrays["near_DP"] = np.array(self._near, np.uint32).reshape(-1, self._dedup.permutations)
        return arrays

    def _encode(self) -> None:
        """Tokenises what waits, all at once."""
        for found in encode_documents(self._tokenizer, self._waiting):
            self._check(found.ids_N)
            self._tokens.append(np.append(found.ids_N, self._tokenizer.eot_id).astype(self._dtype))
            self._lengths.append(len(found.ids_N) + 1)
            self._bytes.append(found.n_bytes)
            if self._masked:
                self._mask.append(np.append(found.learned_N, False).astype(np.uint8))
        self._waiting, self._waiting_chars = [], 0

    def _check(self, ids: np.ndarray) -> None:
        """A tokenizer that gives an id which its own vocabulary does not have must not fill a store with garbage."""
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self._tokenizer.vocab_size:
            wrong = int(ids.max()) if ids.max() >= self._tokenizer.vocab_size else int(ids.min())
            raise DataError(
                f"token id {wrong}: is outside the vocabulary of {self._tokenizer.vocab_size} of the tokenizer that "
                "gave it; mend its file"
            )


def text_of(group: Sequence[Document]) -> str:
    """The text of the record that documents were made of, without what the template adds."""
    return "".join(span.text for document in group for span in document if not span.control)


def sample_texts(corpus: Corpus, pieces: Sequence[Piece], limit_chars: int) -> Iterator[str]:
    """Texts of training records, about `limit_chars` in all, for a tokenizer to be trained on.

    Pieces come in the order that their keys draw: a fair sample, the same whatever else is there; a long one gives
    about `_PIECE_CHARS`.

    Raises:
        DataError: a record cannot be read and the recipe does not skip it.
        StorageError: the source cannot be read.
    """
    for piece in sorted(pieces, key=lambda each: draw(f"{each.name}@{each.start}" if each.start else each.name)):
        taken = 0
        for split, group in _Kept(corpus).groups(corpus.source.read(piece)):
            if split == "train":
                text = text_of(group)
                yield text
                taken += len(text)
            if taken >= min(_PIECE_CHARS, limit_chars):
                break
        limit_chars -= taken
        if limit_chars <= 0:
            return
