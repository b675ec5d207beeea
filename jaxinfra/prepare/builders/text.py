"""Making a store of text: the tokenizer first, then tokens in parallel, then arrays, packings and baselines.

A job reads some pieces, makes documents, tokenises them and commits a part. It is the same function on every engine: a
part depends on its job alone, so it does not matter who makes it, when, or how often.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from jaxinfra.config import encode
from jaxinfra.data.store import arrays
from jaxinfra.data.store.manifest import SPLITS, Kind, Manifest, Split, TokenizerInfo, digest_of
from jaxinfra.data.store.store import LENGTHS, MASK, OFFSETS, TOKENS, TokenStore, hash_files, info_of, token_dtype
from jaxinfra.data.tokenizer import Tokenizer, load_tokenizer
from jaxinfra.errors import ConfigError, DataError
from jaxinfra.prepare import parts
from jaxinfra.prepare.builders import assemble
from jaxinfra.prepare.builders.assemble import Splits, SplitWriter, with_tail
from jaxinfra.prepare.builders.baseline import measured
from jaxinfra.prepare.builders.job import Job
from jaxinfra.prepare.documents.dedup import Signer
from jaxinfra.prepare.documents.document import Document
from jaxinfra.prepare.documents.encoding import Tokens, encode_documents
from jaxinfra.prepare.documents.shingles import digest_of_bytes
from jaxinfra.prepare.parts import Note, Part
from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.recipes.validation import OtherStore, Tail, draw
from jaxinfra.prepare.sources.record import Bad, Found, Piece
from jaxinfra.prepare.sources.stream import Block
from jaxinfra.prepare.tokenizers import TrainBpe, convert, train_bpe
from jaxinfra.storage.atomic import write_bytes_atomic
from jaxinfra.storage.objects import ObjectStore

TOKENIZER_BYTES = 12_000_000
"""Text that a tokenizer is trained on: more changes an 8k vocabulary little and costs time and memory."""
_INFO = "tokenizer-info.json"  # beside the parts: which tokenizer is there
_BATCH_CHARS = _PIECE_CHARS = 1_000_000
_BYTES_PER_TOKEN = 2  # low for a trained vocabulary, which has 3 to 4; so the estimate of the space is high
_CHECKED_CHARS = 200_000  # of the source that a converted tokenizer is tried on: seconds
_FEW_WORDS = 512  # a byte-level BPE of fewer has less than 2.1 bytes a token, on its own text; that of bytes has 1


def tokenise(job: Job[Corpus]) -> Note:
    """Makes and commits the part of a job, or nothing where that raises.

    Raises:
        DataError: a record cannot be used and the recipe does not skip it.
        StorageError: the source cannot be read; OSError: the part cannot be written.
    """
    folder = Path(job.folder)
    part = _part(job, _load_tokenizer(folder, _read_info(folder)), None, read_bytes=job.read_bytes)
    return parts.write(folder, job.number, part)


def _read_info(folder: Path) -> TokenizerInfo:
    """Reads which tokenizer is beside the parts."""
    return TokenizerInfo(**json.loads((folder / _INFO).read_bytes()))


@lru_cache(maxsize=2)
def _load_tokenizer(folder: Path, info: TokenizerInfo) -> Tokenizer:
    """Reads the tokenizer beside the parts; a worker does it once."""
    path = folder / info.file
    return load_tokenizer(info.kind, path.read_bytes(), info.end_of_document, name=str(path))


def _part(job: Job[Corpus], tokenizer: Tokenizer, records: Iterable[Found | Bad] | None, *, read_bytes: int) -> Part:
    """Makes a part of records, in their order; None is those of the job. Raises as `tokenise`."""
    corpus, filtered, count = job.recipe, Counter[str](), 0
    skipped: list[tuple[str, str]] = []
    rows: dict[Split, _Rows] = {split: _Rows(corpus, tokenizer) for split in SPLITS}
    if job.validation and isinstance(corpus.validation, OtherStore):
        for piece in job.pieces:
            count += _copy_documents(corpus.validation, piece, corpus.form.group, tokenizer, rows["validation"])
    else:
        for split, where, group in _groups(job, skipped, filtered, records):
            rows[split].add(where, group)
            count += 1
    splits: dict[Split, dict[str, np.ndarray]] = {split: each.finish() for split, each in rows.items()}
    return Part(
        splits=splits,
        tokens=sum(len(found["tokens_N"]) for found in splits.values()),
        records=count + len(skipped) + filtered.total(),
        read_bytes=read_bytes,
        skipped=tuple(skipped),
        filtered=filtered,
    )


def _copy_documents(other: OtherStore, piece: Piece, group: int, tokenizer: Tokenizer, rows: "_Rows") -> int:
    """Takes documents of another store, whose tokens stay as they are, and returns of how many records they are."""
    store = other.open(piece.name)
    first, documents = piece.start * group, store.manifest.splits[other.split].documents
    count = (documents if piece.end is None else piece.end * group) - first
    some = np.array([first]), np.array([count])
    lengths_D = store.read_ranges(other.split, LENGTHS, *some)
    start = store.read_ranges(other.split, OFFSETS, *some)[:1]
    tokens_N, mask_N = store.read_segments(other.split, start, lengths_D.sum(keepdims=True))
    learned_N = np.ones(len(tokens_N), bool) if mask_N is None else mask_N.astype(bool)
    ends = np.cumsum(lengths_D).tolist()
    for number, (end, length) in enumerate(zip(ends, lengths_D.tolist(), strict=True), first):
        ids_N = tokens_N[end - length : end - 1].astype(np.int64)
        text = tokenizer.decode(ids_N.tolist())
        found = Tokens(ids_N=ids_N, learned_N=learned_N[end - length : end - 1], n_bytes=len(text.encode()))
        rows.note(f"{other.store} document {number}", text, 1)
        rows.append(found)
    return count // group


def _groups(
    job: Job[Corpus],
    skipped: list[tuple[str, str]],
    filtered: Counter[str],
    records: Iterable[Found | Bad] | None = None,
) -> Iterator[tuple[Split, str, Sequence[Document]]]:
    """Yields the split of each record that is kept, where it is, and its documents; counts the others by reason."""
    corpus = job.recipe
    for split, where, group in job.made(corpus.form.documents, skipped, records):
        reasons = (corpus.filters.reason(_text_of([document])) for document in group)
        if reason := next(filter(None, reasons), None):
            filtered[reason] += 1
        else:
            yield split, where, group


class _Rows:
    """Documents of one split, tokenised in batches."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer):
        self._corpus, self._tokenizer, self._dtype = corpus, tokenizer, token_dtype(tokenizer.vocab_size)
        self._sign = None if corpus.dedup is None else Signer(corpus.dedup)
        self._waiting: list[Document] = []
        self._waiting_chars = 0
        self._done: list[Tokens] = []
        self._where: list[str] = []
        self._signatures: list[tuple[np.ndarray, np.ndarray | None]] = []

    def add(self, where: str, group: Sequence[Document]) -> None:
        """Takes the documents of a record."""
        self.note(where, _text_of(group), len(group))
        self._waiting += group
        self._waiting_chars += sum(len(span.text) for document in group for span in document)
        if self._waiting_chars >= _BATCH_CHARS:
            self._encode()

    def finish(self) -> dict[str, np.ndarray]:
        """Returns the arrays of a part, D documents with N tokens.

        `tokens_N`: ids, each document with its end; `lengths_D`, `bytes_D`: tokens and bytes of text of each;
        `digest_D2`: the hash of the tokens of each; where some are not learned `mask_N`, 1 for those that are; where
        duplicates are looked for `exact_D2` and `near_DP`, the hash and the MinHash of each text; where an overlap ends
        the work `where_D`, the place of each.
        """
        self._encode()
        done, dedup = self._done, self._corpus.dedup
        found = {
            "tokens_N": np.concatenate([np.empty(0, self._dtype), *(each.ids_N for each in done)]),
            "lengths_D": np.array([len(each.ids_N) for each in done], np.int64),
            "bytes_D": np.array([each.n_bytes for each in done], np.int64),
            "digest_D2": np.array([digest_of_bytes(each.ids_N.data) for each in done], np.uint64).reshape(-1, 2),
        }
        if self._corpus.form.masked:
            found["mask_N"] = np.concatenate([np.empty(0, bool), *(each.learned_N for each in done)]).astype(np.uint8)
        if dedup is not None:
            found["exact_D2"] = np.array([exact for exact, _ in self._signatures], np.uint64).reshape(-1, 2)
        if dedup is not None and dedup.near:
            near = [near for _, near in self._signatures]
            found["near_DP"] = np.array(near, np.uint32).reshape(-1, dedup.permutations)
        if self._corpus.on_overlap == "fail":
            found["where_D"] = np.array(self._where, np.str_)
        return found

    def note(self, where: str, text: str, count: int) -> None:
        """Keeps what is known of a record for each of its documents."""
        self._where += [where] * count
        self._signatures += [] if self._sign is None else [self._sign(text)] * count

    def _encode(self) -> None:
        """Tokenises what waits, all at once."""
        words = self._tokenizer.vocab_size
        for found in encode_documents(self._tokenizer, self._waiting):
            wrong = found.ids_N[(found.ids_N < 0) | (found.ids_N >= words)]
            if wrong.size:  # it would fill a store with garbage
                cause = f"is outside the vocabulary of {words} of the tokenizer that gave it"
                raise DataError(f"token id {wrong[0]}: {cause}; mend its file")
            self.append(found)
        self._waiting, self._waiting_chars = [], 0

    def append(self, found: Tokens) -> None:
        """Keeps the tokens of a document, with its end."""
        ids_N = np.append(found.ids_N, self._tokenizer.eot_id).astype(self._dtype)
        mask_N = np.append(found.learned_N, False) if self._corpus.form.masked else np.empty(0, bool)
        self._done.append(Tokens(ids_N=ids_N, learned_N=mask_N, n_bytes=found.n_bytes))


def _text_of(group: Sequence[Document]) -> str:
    """Returns the text of the record that documents were made of, without what the template adds."""
    return "".join(span.text for document in group for span in document if not span.control)


def _sample_texts(corpus: Corpus, pieces: Sequence[Piece], limit_chars: int) -> Iterator[str]:
    """Yields about `limit_chars` of training records, none of the tail, for a tokenizer. Raises as `tokenise`.

    Pieces come in the order that their keys draw: a fair sample, the same whatever else is there; a long one gives
    about `_PIECE_CHARS`.
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
    groups = _groups(Job(number=0, pieces=(piece,), recipe=corpus, folder=""), [], Counter())
    return (_text_of(group) for split, _, group in groups if split == "train")


class TextMaker:
    """What preparing a corpus has of its own."""

    stage = "tokens"
    job = staticmethod(tokenise)

    def __init__(self, corpus: Corpus):
        """Reads an existing tokenizer; a ConfigError if it cannot be used, or the template of the form, or not both."""
        self._corpus, config = corpus, corpus.tokenizer
        if isinstance(config, TrainBpe):
            self._existing, digest, special = None, None, {config.end_of_document, *config.special_tokens}
        else:
            self._existing = given, _ = convert(config)
            digest, special = given.sha256, given.special_tokens
        # Of the files that the recipe names; a tokenizer that is trained follows from all else.
        found = [digest, corpus.form.identity()]
        self.identity = digest_of(found) if any(found) else None
        self._kind: Kind = "text" if corpus.form.group == 1 else "pairs"
        for marker in corpus.form.markers():
            if marker not in special:
                raise ConfigError(
                    f"form: its template writes {marker}, which is no special token of the tokenizer, so that any text "
                    "could spell it; name it in tokenizer.special_tokens, or use another template"
                )

    def begin(self, folder: Path, pieces: Sequence[Piece]) -> None:
        """Puts the tokenizer beside the parts; one that is trained is trained once, one that was converted is checked.

        `pieces` are of the training source, the same ones whatever the recipe says of shards. Raises as `tokenise`, and
        a ConfigError if the source shows that a converted tokenizer gives other tokens, or if the store that the
        validation split is of has another tokenizer or form.
        """
        corpus, known = self._corpus, folder / _INFO
        if not known.exists():
            if self._existing is None:
                given = train_bpe(_sample_texts(corpus, pieces, TOKENIZER_BYTES), **vars(corpus.tokenizer))
            else:
                given, check = self._existing
                check(_sample_texts(corpus, pieces, _CHECKED_CHARS))
            info = info_of(given)
            write_bytes_atomic(folder / info.file, given.content)
            write_bytes_atomic(known, json.dumps(asdict(info)).encode())
        self._info = _read_info(folder)
        self._dtype = token_dtype(self._info.vocab_size)
        if isinstance(corpus.validation, OtherStore):
            corpus.validation.require_same(self._info, kind=self._kind, masked=corpus.form.masked)

    def part(self, folder: Path, block: Block) -> Part:
        """Makes the part of a block of a stream; after `begin`."""
        job = Job(number=0, pieces=(), recipe=self._corpus, folder=str(folder))
        part = _part(job, _load_tokenizer(folder, self._info), block.records, read_bytes=block.read_bytes)
        return replace(part, position=block.position)

    def needed_bytes(self, source_bytes: int) -> int:
        """Parts and arrays exist at once, and a byte of the mask beside each token.

        Low for compressed sources, for documents of a few bytes, and for a text that the tokenizer is not trained for.
        """
        bytes_per_token = 1 if self._info.vocab_size < _FEW_WORDS else _BYTES_PER_TOKEN
        form = self._corpus.form
        return 2 * source_bytes * form.group * (self._dtype.itemsize + form.masked) // bytes_per_token

    def assemble(self, folder: Path, numbers: Sequence[int], build: Path, source_digest: str) -> Manifest:
        """Makes all files of the version but the manifest, of all parts in their order.

        Raises:
            ConfigError: a split has nothing in it.
            DataError: a part is damaged; or a document is in both splits, and the recipe allows none.
        """
        corpus = self._corpus
        source = Splits(folder=folder, numbers=numbers)
        if isinstance(corpus.validation, Tail):
            source = with_tail(source, corpus, corpus.validation, _load_tokenizer(folder, self._info))
        keep, counts = assemble.kept(corpus, source, build)
        splits, packs = {}, {}
        for split in SPLITS:
            writer = SplitWriter(build / split, self._dtype, masked=corpus.form.masked)
            names = ("tokens_N", "lengths_D", "bytes_D", *(("mask_N",) if corpus.form.masked else ()))
            for tokens_N, lengths_D, bytes_D, *masks in source.kept(split, keep, *names):
                writer.add(tokens_N, lengths_D, masks[0] if masks else None, int(bytes_D.sum()))
            splits[split] = writer.close()
            for pack in corpus.packs:
                packs[f"{split}/{pack.name}"] = assemble.write_pack(build, split, pack, writer.lengths)
        shutil.copyfile(folder / self._info.file, build / self._info.file)
        manifest = Manifest(
            kind=self._kind,
            recipe=encode(corpus),
            source_digest=source_digest,
            counts=counts,
            dtype=self._dtype.name,
            masked=corpus.form.masked,
            block=arrays.CHUNK,
            tokenizer=self._info,
            splits=splits,
            packs=packs,
            files=hash_files(build, unhashed=(TOKENS, MASK)),
            baselines={},
            **assemble.made_now(),
        )
        if corpus.baselines:
            manifest = replace(manifest, baselines=measured(TokenStore(ObjectStore(build), manifest)))
        return manifest
