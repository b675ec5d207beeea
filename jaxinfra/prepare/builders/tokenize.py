"""One job of preparing text: read some pieces, make documents, tokenise them, commit a part.

It is the same function on every engine. A part depends on its job alone, so it does not matter who makes it, when, or
how often.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from jaxinfra.data.store.manifest import SPLITS, Split, TokenizerInfo
from jaxinfra.data.store.store import LENGTHS, OFFSETS, token_dtype
from jaxinfra.data.tokenizer import Tokenizer, restore
from jaxinfra.errors import DataError
from jaxinfra.prepare import parts
from jaxinfra.prepare.builders.job import Job, Records
from jaxinfra.prepare.documents.dedup import Signer
from jaxinfra.prepare.documents.document import Document
from jaxinfra.prepare.documents.encoding import Tokens, encode_documents
from jaxinfra.prepare.documents.shingles import digest_of
from jaxinfra.prepare.parts import Note, Part
from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.recipes.validation import OtherStore, Tail, draw
from jaxinfra.prepare.sources.record import Bad, Found, Piece

TOKENIZER_INFO = "tokenizer-info.json"
"""The file beside the parts that says which tokenizer is there."""
_BATCH_CHARS = 1_000_000
_PIECE_CHARS = 1_000_000


def tokenise(job: Job[Corpus]) -> Note:
    """Makes and commits the part of a job; nothing is committed where that raises.

    Raises:
        DataError: a record cannot be read and the recipe does not skip it.
        StorageError: the source cannot be read; OSError: the part cannot be written.
    """
    folder = Path(job.folder)
    tokenizer = load_tokenizer(folder, read_info(folder))
    other = job.recipe.validation
    if job.validation and isinstance(other, OtherStore):
        part = copy_part(job, other, tokenizer)
    else:
        part = make_part(job, tokenizer, job.records(), read_bytes=job.read_bytes)
    return parts.write(folder, job.number, part)


def read_info(folder: Path) -> TokenizerInfo:
    """Reads which tokenizer is beside the parts."""
    return TokenizerInfo(**json.loads((folder / TOKENIZER_INFO).read_bytes()))


@lru_cache(maxsize=2)
def load_tokenizer(folder: Path, info: TokenizerInfo) -> Tokenizer:
    """Reads the tokenizer beside the parts; a worker does it once."""
    path = folder / info.file
    return restore(info.kind, path.read_bytes(), info.end_of_document, name=str(path))


def make_part(job: Job[Corpus], tokenizer: Tokenizer, records: Iterable[Found | Bad], *, read_bytes: int) -> Part:
    """Makes a part of records, in their order; raises as `tokenise`."""
    seen, filtered = Records(job.recipe.on_bad), Counter[str]()
    rows: dict[Split, _Rows] = {split: _Rows(job.recipe, tokenizer) for split in SPLITS}
    for split, where, group in _groups(job, records, seen, filtered):
        rows[split].add(where, group)
    return Part(
        splits={split: each.finish() for split, each in rows.items()},
        tokens=sum(each.tokens for each in rows.values()),
        records=seen.count,
        read_bytes=read_bytes,
        skipped=tuple(seen.skipped),
        filtered=filtered,
    )


def copy_part(job: Job[Corpus], other: OtherStore, tokenizer: Tokenizer) -> Part:
    """Makes a part of documents of another store, whose tokens are taken as they are; raises as `OtherStore.open`."""
    empty, rows = _Rows(job.recipe, tokenizer), _Rows(job.recipe, tokenizer)
    group, records = job.recipe.form.group, 0
    for piece in job.pieces:
        store = other.open(piece.name)
        documents = store.manifest.splits[other.split].documents
        first, last = piece.start * group, documents if piece.end is None else piece.end * group
        one = np.array([first]), np.array([last - first])
        lengths_D = store.read_ranges(other.split, LENGTHS, *one)
        start = store.read_ranges(other.split, OFFSETS, *one)[:1]
        tokens_N, mask_N = store.read_pieces(other.split, start, lengths_D.sum(keepdims=True))
        learned_N = np.ones(len(tokens_N), bool) if mask_N is None else mask_N.astype(bool)
        ends = np.cumsum(lengths_D)
        for number, (end, length) in enumerate(zip(ends.tolist(), lengths_D.tolist(), strict=True)):
            ids_N, where = tokens_N[end - length : end - 1].astype(np.int64), f"{other.store} document {first + number}"
            text = tokenizer.decode(ids_N.tolist())
            found = Tokens(ids_N=ids_N, learned_N=learned_N[end - length : end - 1], n_bytes=len(text.encode()))
            rows.add_tokens(where, found, text)
        records += (last - first) // group
    return Part(
        splits={"train": empty.finish(), "heldout": rows.finish()},
        tokens=rows.tokens,
        records=records,
        read_bytes=job.read_bytes,
    )


def _groups(
    job: Job[Corpus], records: Iterable[Found | Bad], seen: Records, filtered: Counter[str]
) -> Iterator[tuple[Split, str, Sequence[Document]]]:
    """Yields the split of each record that is kept, where it is, and its documents; counts the others by reason."""
    corpus = job.recipe
    for each, group in seen.made(records, corpus.form.documents):
        reasons = (corpus.filters.reason(text_of([document])) for document in group)
        reason = next(filter(None, reasons), None)
        if reason is None:
            yield job.split_of(each.key), each.where, group
        else:
            filtered[reason] += 1


class _Rows:
    """Documents of one split, tokenised in batches, and how many tokens they have so far."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer):
        self._corpus, self._tokenizer, self._dtype = corpus, tokenizer, token_dtype(tokenizer.vocab_size)
        self._sign = None if corpus.dedup is None else Signer(corpus.dedup)
        self._waiting: list[Document] = []
        self._waiting_chars = self.tokens = 0
        self._rows = defaultdict[str, list[Any]](list)

    def add(self, where: str, group: Sequence[Document]) -> None:
        """Takes the documents of a record."""
        self._note(where, text_of(group), len(group))
        self._waiting += group
        self._waiting_chars += sum(len(span.text) for document in group for span in document)
        if self._waiting_chars >= _BATCH_CHARS:
            self._encode()

    def add_tokens(self, where: str, found: Tokens, text: str) -> None:
        """Takes a document that is tokenised; `text` is that of its record."""
        self._note(where, text, 1)
        self._append(found)

    def finish(self) -> dict[str, np.ndarray]:
        """Returns the arrays of a part, D documents with N tokens.

        Returns:
            `tokens_N`: ids, each document with its end; `lengths_D`, `bytes_D`: tokens and bytes of text of each,
            int64; `digest_D2`: the hash of the tokens of each, uint64; where some are not learned `mask_N`, uint8, 1
            for those that are; where duplicates are looked for `exact_D2`, the hash of each text, uint64, and
            `near_DP`, its MinHash; where an overlap ends the work `where_D`, the place of each.
        """
        self._encode()
        corpus, rows = self._corpus, self._rows
        found = {"tokens_N": np.concatenate([np.empty(0, self._dtype), *rows["tokens_N"]])}
        for name in ("lengths_D", "bytes_D"):
            found[name] = np.array(rows[name], np.int64)
        found["digest_D2"] = np.array(rows["digest_D2"], np.uint64).reshape(-1, 2)
        if corpus.form.masked:
            found["mask_N"] = np.concatenate([np.empty(0, np.uint8), *rows["mask_N"]])
        if corpus.dedup is not None:
            found["exact_D2"] = np.array(rows["exact_D2"], np.uint64).reshape(-1, 2)
            if corpus.dedup.near:
                found["near_DP"] = np.array(rows["near_DP"], np.uint32).reshape(-1, corpus.dedup.permutations)
        if corpus.on_overlap == "fail":
            found["where_D"] = np.array(rows["where_D"], np.str_)
        return found

    def _note(self, where: str, text: str, count: int) -> None:
        """Keeps what is known of a record for each of its documents."""
        signatures = () if self._sign is None else zip(("exact_D2", "near_DP"), self._sign(text), strict=True)
        for name, value in (("where_D", where), *signatures):
            self._rows[name] += [value] * count

    def _encode(self) -> None:
        """Tokenises what waits, all at once."""
        for found in encode_documents(self._tokenizer, self._waiting):
            self._check(found.ids_N)
            self._append(found)
        self._waiting, self._waiting_chars = [], 0

    def _append(self, found: Tokens) -> None:
        tokens_N = np.append(found.ids_N, self._tokenizer.eot_id).astype(self._dtype)
        self.tokens += len(tokens_N)
        row = {"tokens_N": tokens_N, "lengths_D": len(tokens_N), "bytes_D": found.n_bytes}
        row |= {"digest_D2": digest_of(tokens_N.data)}
        if self._corpus.form.masked:
            row["mask_N"] = np.append(found.learned_N, False).astype(np.uint8)
        for name, value in row.items():
            self._rows[name].append(value)

    def _check(self, ids: np.ndarray) -> None:
        """Refuses an id that the tokenizer's own vocabulary does not have: it would fill a store with garbage."""
        wrong = ids[(ids < 0) | (ids >= self._tokenizer.vocab_size)]
        if wrong.size:
            raise DataError(
                f"token id {wrong[0]}: is outside the vocabulary of {self._tokenizer.vocab_size} of the tokenizer that "
                "gave it; mend its file"
            )


def text_of(group: Sequence[Document]) -> str:
    """Returns the text of the record that documents were made of, without what the template adds."""
    return "".join(span.text for document in group for span in document if not span.control)


def sample_texts(corpus: Corpus, pieces: Sequence[Piece], limit_chars: int) -> Iterator[str]:
    """Texts of training records, about `limit_chars` in all, for a tokenizer to be trained on.

    Pieces come in the order that their keys draw: a fair sample, the same whatever else is there; a long one gives
    about `_PIECE_CHARS`. Of a corpus whose tail is validation data, the pieces before the tail alone are read. Raises
    as `tokenise`.
    """
    if isinstance(corpus.validation, Tail):
        sizes, share = np.cumsum([piece.size_bytes for piece in pieces]), 1 - corpus.validation.fraction
        before = int(np.searchsorted(sizes, sizes[-1] * share, side="right"))
        if not before:  # the first piece reaches into the tail, such as the only file of a corpus
            texts = list(_training_texts(corpus, pieces[0]))
            left = min(limit_chars, int(sum(map(len, texts)) * share))
            for text in texts:
                yield text[:left]
                left = max(0, left - len(text))
            return
        pieces = pieces[:before]
    for piece in sorted(pieces, key=lambda each: draw(f"{each.name}@{each.start}" if each.start else each.name)):
        taken = 0
        for text in _training_texts(corpus, piece):
            yield text
            taken += len(text)
            if taken >= min(_PIECE_CHARS, limit_chars):
                break
        limit_chars -= taken
        if limit_chars <= 0:
            return


def _training_texts(corpus: Corpus, piece: Piece) -> Iterator[str]:
    job = Job(number=0, pieces=(piece,), recipe=corpus, folder="")
    groups = _groups(job, job.records(), Records(corpus.on_bad), Counter())
    return (text_of(group) for split, _, group in groups if split == "train")
