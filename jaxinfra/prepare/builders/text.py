"""Builds a store of text: first the tokenizer, then tokens in parallel, then arrays, packings and baselines.

A job reads some shards, makes documents of their records, tokenizes them and commits a part. The part depends only on
the job, so any worker may make it at any time, even twice. A record is one document, or several that stay together,
such as the two answers of a preference pair.

Shape suffixes: N tokens and D documents of a part, 2 halves of a 128-bit hash, P permutations of a MinHash signature.
"""

import itertools
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import override

import numpy as np

from jaxinfra.config import encode
from jaxinfra.data.store import arrays
from jaxinfra.data.store.layout import LENGTHS, OFFSETS
from jaxinfra.data.store.manifest import SPLITS, Manifest, Split, TokenizerInfo, digest_of
from jaxinfra.data.store.store import TokenStore, token_dtype
from jaxinfra.data.tokenizer import StreamDecoder, Tokenizer, load_tokenizer
from jaxinfra.errors import ConfigError, DataError
from jaxinfra.prepare import parts
from jaxinfra.prepare.builders.baseline import measure_baselines
from jaxinfra.prepare.builders.job import PrepareJob, StoreBuilder, process_records
from jaxinfra.prepare.builders.select import select_documents
from jaxinfra.prepare.builders.writers import common_fields, write_pack, write_split
from jaxinfra.prepare.documents.dedup import Signer
from jaxinfra.prepare.documents.document import Document
from jaxinfra.prepare.documents.encoding import EncodedDocument, encode_documents
from jaxinfra.prepare.documents.shingles import hash128
from jaxinfra.prepare.parts import Arrays, PartMetadata, PartSplits, open_part
from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.recipes.validation import LastDocuments, OtherStore, Tail, hash_to_unit
from jaxinfra.prepare.sources.record import Records, SourceShard
from jaxinfra.prepare.sources.stream import Position, StreamBatch
from jaxinfra.prepare.tokenizers import TrainBpe, convert_tokenizer, train_bpe
from jaxinfra.storage.atomic import write_bytes_atomic
from jaxinfra.storage.credentials import mask_tree
from jaxinfra.storage.objects import ObjectStore

TOKENIZER_TRAINING_CHARS = 12_000_000
"""Characters that a tokenizer is trained on; more change an 8k vocabulary little and cost time and memory."""
_INFO_FILE = "tokenizer-info.json"  # beside the parts
_BATCH_CHARS = _SAMPLE_SHARD_CHARS = 1_000_000
_DECODE_TOKENS = 16  # tokens to decode before a cut, to see whether it splits a character
_BREAK_TOKENS = 4096  # tokens to look for the begin of a line in; many paragraphs are one line
_BYTES_PER_TOKEN = 2  # a trained vocabulary has 3 to 4; a low value makes the estimate of disk space safe
_CHECKED_CHARS = 200_000  # characters of the source to compare a converted tokenizer on; takes seconds
_SMALL_VOCAB = 512  # a byte-level BPE with fewer tokens has less than 2.1 bytes per token on its own text

type _Signatures = tuple[np.ndarray | None, np.ndarray | None]  # of a record: exact and near; None without dedup


def tokenize_job(folder: Path, job: PrepareJob[Corpus]) -> PartMetadata:
    """Makes and commits the part of a job, in a folder that has the tokenizer.

    Raises DataError for a bad record if the recipe does not skip them, StorageError if the source cannot be read, and
    OSError if the part cannot be written.
    """
    validation, builder = job.recipe.validation, _PartBuilder(job.recipe, folder)
    if job.validation and isinstance(validation, OtherStore):
        for shard in job.shards:
            builder.copy_documents(validation, shard)
    else:
        builder.add_records(job.read_records(), validation=job.validation)
    return builder.write(job.number, read_bytes=job.read_bytes)


def tokenize_batch(corpus: Corpus, folder: Path, number: int, batch: StreamBatch) -> PartMetadata:
    """Makes and commits the part of a batch of a stream; raises as `tokenize_job`."""
    builder = _PartBuilder(corpus, folder)
    builder.add_records(iter(batch.records))
    return builder.write(number, read_bytes=batch.read_bytes, position=batch.position)


def _read_info(folder: Path) -> TokenizerInfo:
    return TokenizerInfo(**json.loads((folder / _INFO_FILE).read_bytes()))


@lru_cache(maxsize=2)
def _load_tokenizer(folder: Path, info: TokenizerInfo) -> Tokenizer:
    """Loads the tokenizer beside the parts; cached, so that a worker loads it once."""
    path = folder / info.file
    return load_tokenizer(info.kind, path.read_bytes(), info.end_of_document, name=str(path))


class _PartBuilder:
    """Makes a part from records, which it tokenizes in batches, or from documents of another store."""

    def __init__(self, corpus: Corpus, folder: Path):
        """`folder` has the tokenizer, and gets the part."""
        self._corpus, self._folder, self.tokenizer = corpus, folder, _load_tokenizer(folder, _read_info(folder))
        self._dtype = token_dtype(self.tokenizer.vocab_size)
        self._signer = None if corpus.dedup is None else Signer(corpus.dedup)
        # Of each document: its record's location and signatures, and its tokens with the end token.
        self._rows: dict[Split, list[tuple[str, _Signatures, EncodedDocument]]] = {split: [] for split in SPLITS}
        self._num_kept = 0  # records
        self._skipped: list[tuple[str, str]] = []
        self._filtered = Counter[str]()

    def add_records(self, records: Records, *, validation: bool = False) -> None:
        """Adds all records; `validation` puts all into the validation split. Raises as `tokenize_job`."""
        corpus, to_documents = self._corpus, self._corpus.format.to_documents
        processed = process_records(corpus, records, to_documents, self._skipped, validation=validation)
        waiting, waiting_chars = [], 0  # records to be tokenized
        for split, location, documents in processed:
            if reason := _filter_reason(corpus, documents):
                self._filtered[reason] += 1
                continue
            waiting.append((split, location, documents))
            waiting_chars += sum(len(span.text) for document in documents for span in document)
            if waiting_chars >= _BATCH_CHARS:
                self._encode(waiting)
                waiting, waiting_chars = [], 0
        self._encode(waiting)

    def copy_documents(self, other: OtherStore, shard: SourceShard) -> None:
        """Copies the tokens of a range of records of another store."""
        store, per_record = other.open(shard.name), self._corpus.format.documents_per_record
        end = store.manifest.splits[other.split].documents if shard.end is None else shard.end * per_record
        first = shard.start * per_record  # document
        lengths_D = store.read_ranges(other.split, LENGTHS, np.array([first]), np.array([end - first]))
        offset = store.read_ranges(other.split, OFFSETS, np.array([first]), np.array([1]))
        tokens_N, mask_N = store.read_with_mask(other.split, offset, lengths_D.sum(keepdims=True))
        in_loss_N = np.ones(len(tokens_N), np.uint8) if mask_N is None else mask_N
        ends_D = np.cumsum(lengths_D)
        for number, start, stop in zip(range(first, end), ends_D - lengths_D, ends_D - 1, strict=True):
            ids_N = tokens_N[start:stop].astype(np.int64)  # without the end token
            text = self.tokenizer.decode(ids_N.tolist())
            document = EncodedDocument(ids_N=ids_N, in_loss_N=in_loss_N[start:stop], num_bytes=len(text.encode()))
            self.add("validation", f"{other.store} document {number}", text, [document])
        self._num_kept += (end - first) // per_record

    def add(self, split: Split, location: str, text: str, documents: Sequence[EncodedDocument]) -> None:
        """Adds the documents of a record, each with its end token; `text` is that of the record."""
        signatures = (None, None) if self._signer is None else self._signer(text)
        for document in documents:
            tokens_N = np.append(document.ids_N, self.tokenizer.eot_id).astype(self._dtype)
            in_loss_N = np.append(document.in_loss_N, False)
            self._rows[split].append((location, signatures, replace(document, ids_N=tokens_N, in_loss_N=in_loss_N)))

    def write(self, number: int, *, read_bytes: int, position: Position | None = None) -> PartMetadata:
        """Commits the part with its number; `position` is that of a stream after the last record."""
        splits: dict[Split, parts.Arrays] = {split: self.arrays(split) for split in SPLITS}
        metadata = PartMetadata(
            tokens=sum(len(arrays["tokens_N"]) for arrays in splits.values()),
            records=self._num_kept + len(self._skipped) + self._filtered.total(),
            read_bytes=read_bytes,
            skipped=tuple(self._skipped),
            filtered=self._filtered,
            position=position or {},
        )
        return parts.write_part(self._folder, number, metadata, splits)

    def arrays(self, split: Split) -> dict[str, np.ndarray]:
        """Returns the arrays of a split."""
        rows, dedup = self._rows[split], self._corpus.dedup
        token_arrays = [document.ids_N for _, _, document in rows]
        named = {
            "tokens_N": np.concatenate([np.empty(0, self._dtype), *token_arrays]),  # each document with its end token
            "lengths_D": np.array([len(tokens_N) for tokens_N in token_arrays], np.int64),  # tokens of each document
            "bytes_D": np.array([document.num_bytes for _, _, document in rows], np.int64),  # of its text
            "digest_D2": np.array([hash128(tokens_N.data) for tokens_N in token_arrays], np.uint64).reshape(-1, 2),
        }
        if self._corpus.format.has_loss_mask:  # 1 for tokens in the loss
            named["mask_N"] = np.concatenate([np.empty(0, np.uint8), *(document.in_loss_N for _, _, document in rows)])
        if dedup is not None:
            named["exact_D2"] = np.array([exact for _, (exact, _), _ in rows], np.uint64).reshape(-1, 2)
        if dedup is not None and dedup.near:
            near = [near for _, (_, near), _ in rows]
            named["near_DP"] = np.array(near, np.uint32).reshape(-1, dedup.num_permutations)
        if self._corpus.on_overlap == "fail":
            named["where_D"] = np.array([location for location, _, _ in rows], np.str_)
        return named

    def _encode(self, records: Sequence[tuple[Split, str, Sequence[Document]]]) -> None:
        """Tokenizes the documents of records and adds them; each record has a split and a location."""
        vocab_size, per_record = self.tokenizer.vocab_size, self._corpus.format.documents_per_record
        encoded = encode_documents(self.tokenizer, [document for *_, documents in records for document in documents])
        for document in encoded:
            wrong = document.ids_N[(document.ids_N < 0) | (document.ids_N >= vocab_size)]
            if wrong.size:  # the token dtype could not hold it
                cause = f"the tokenizer gave it, but its vocabulary has only {vocab_size} tokens"
                raise DataError(f"token id {wrong[0]}: {cause}; use another tokenizer file")
        encoded_records = itertools.batched(encoded, per_record)
        for (split, location, documents), encoded_record in zip(records, encoded_records, strict=True):
            self.add(split, location, record_text(documents), encoded_record)
        self._num_kept += len(records)


def _filter_reason(corpus: Corpus, documents: Sequence[Document]) -> str | None:
    """Returns why the filters leave out a record with these documents; None if all of them pass."""
    reasons = (corpus.filters.reason(record_text([document])) for document in documents)
    return next(filter(None, reasons), None)


def record_text(documents: Sequence[Document]) -> str:
    """Returns the text of the record, without what the template adds."""
    return "".join(span.text for document in documents for span in document if not span.from_template)


def _split_tail(splits: PartSplits, corpus: Corpus, config: Tail) -> PartSplits:
    """Splits the tail off parts that hold training data only; DataError if a part is damaged.

    The document in which the tail begins is split between two tokens if it is plain text; other records stay whole.
    `LastDocuments` moves the cut to the end of a document, or else to that of a line or word.
    """
    per_record = corpus.format.documents_per_record
    bytes_of_parts = [bytes_D for (bytes_D,) in splits.read("train", "bytes_D")]
    if not any(map(len, bytes_of_parts)):  # `select_documents`, which the caller calls next, raises the error
        return splits
    document_bytes = np.concatenate(bytes_of_parts)
    document_ends = np.cumsum(document_bytes)
    part_ends = np.cumsum([len(bytes_D) for bytes_D in bytes_of_parts])  # in documents
    # For documents of 40, 40 and 20 bytes and fraction=0.3, the tail begins after 70 bytes: 30 bytes into document 1.
    train_bytes = int(document_bytes.sum() * (1 - config.fraction))
    keeps_whole = isinstance(config, LastDocuments)
    if keeps_whole:
        tail_bytes = document_ends[-1] - document_ends
        least, most = config.fraction / 2 * document_ends[-1], _largest_fraction(config) * document_ends[-1]
        fitting = document_ends[(least <= tail_bytes) & (tail_bytes <= most)]
        train_bytes = min(fitting.tolist(), key=lambda end: abs(end - train_bytes), default=train_bytes)
    document = int(np.searchsorted(document_ends, train_bytes, side="right"))
    part_index = min(int(np.searchsorted(part_ends, document, side="right")), len(part_ends) - 1)
    with open_part(splits.folder, part_index) as part:
        cut_part = {key.removeprefix("train."): part[key] for key in part if key.startswith("train.")}
    num_before = int(part_ends[part_index]) - len(bytes_of_parts[part_index])  # documents of the parts before
    cut = document - num_before  # documents of this part that are for training
    if document < len(document_bytes) and per_record == 1 and not corpus.format.has_loss_mask:
        num_bytes = int(document_bytes[document])
        document_start = int(document_ends[document]) - num_bytes  # in bytes, like `train_bytes`
        fraction = (train_bytes - document_start) / num_bytes
        builder = _PartBuilder(corpus, splits.folder)
        if halved := _split_document(cut_part, cut, fraction, builder, at_break=keeps_whole):
            cut_part, cut = halved, cut + 1
    cut = cut // per_record * per_record  # before the first document of its record
    if num_before + cut == 0:
        cut = per_record  # the first record is for training
    cut_token = int(cut_part["lengths_D"][:cut].sum())
    cuts = {name: cut_token if name.endswith("_N") else cut for name in cut_part}
    train = {name: values[: cuts[name]] for name, values in cut_part.items()}
    validation = {name: values[cuts[name] :] for name, values in cut_part.items()}
    later_parts = range(part_index + 1, splits.num_parts)
    # The parts of each split in order: the number of a whole part, or the cut_part of the part that is cut.
    return replace(splits, tail={"train": [*range(part_index), train], "validation": [validation, *later_parts]})


def _largest_fraction(config: Tail) -> float:
    """Returns the largest fraction of the text that a tail takes."""
    fraction = config.fraction
    return min(2 * fraction, (1 + fraction) / 2) if isinstance(config, LastDocuments) else fraction


def _split_document(
    part: Arrays, document: int, fraction: float, builder: _PartBuilder, *, at_break: bool
) -> Arrays | None:
    """Splits a document of a part at the first token after `fraction` that begins a character.

    With `at_break` it is one that begins a line, else a word, if one is near. Returns None without such a token.
    `builder` has no documents yet; it makes the arrays of the halves.
    """
    first_token = int(part["lengths_D"][:document].sum())
    end_token = first_token + int(part["lengths_D"][document])
    ids_N = part["tokens_N"][first_token : end_token - 1]  # without the token that ends the document
    ids, decode = ids_N.tolist(), builder.tokenizer.decode
    cut = int(len(ids) * fraction)
    while 0 < cut < len(ids) and decode(ids[max(0, cut - _DECODE_TOKENS) : cut]).endswith("\ufffd"):
        cut += 1
    if not 0 < cut < len(ids):
        return None
    if at_break:
        cut = _next_break(builder.tokenizer, ids, cut)
    texts = decode(ids[:cut]), decode(ids[cut:])
    first_bytes = len(texts[0].encode())
    sizes = first_bytes, int(part["bytes_D"][document]) - first_bytes
    location = part["where_D"][document] if "where_D" in part else ""  # of both halves
    for half_N, text, num_bytes in zip((ids_N[:cut], ids_N[cut:]), texts, sizes, strict=True):
        half = EncodedDocument(ids_N=half_N, in_loss_N=np.ones(len(half_N), bool), num_bytes=num_bytes)
        builder.add("train", location, text, [half])
    split = {}
    for name, halves in builder.arrays("train").items():
        start, end = (first_token, end_token) if name.endswith("_N") else (document, document + 1)
        split[name] = np.concatenate([part[name][:start], halves, part[name][end:]])
    return split


def _next_break(tokenizer: Tokenizer, ids: Sequence[int], first: int) -> int:
    """Returns the first token from `first` on that begins a line, else the first one that begins a word, else `first`.

    It looks at no more than `_BREAK_TOKENS`, and half of those that are left.
    """
    looked_at = ids[first - 1 : first + 1 + min(_BREAK_TOKENS, (len(ids) - first) // 2)]
    cuts = list(enumerate(itertools.pairwise(map(StreamDecoder(tokenizer).push, looked_at)), first))
    lines = (cut for cut, (before, _) in cuts if before.endswith("\n"))
    words = (cut for cut, (before, after) in cuts if before[-1:].isspace() or after[:1].isspace())
    return next(lines, next(words, first))


def _sample_texts(corpus: Corpus, shards: Sequence[SourceShard], limit_chars: int) -> Iterator[str]:
    """Yields about `limit_chars` of training text, without a validation tail. Raises as `tokenize_job`.

    Shards come in the order of their hashed names, which gives a fair sample that changes little when files are added.
    At most about `_SAMPLE_SHARD_CHARS` come from one shard.
    """
    if isinstance(corpus.validation, Tail):
        train_fraction = 1 - _largest_fraction(corpus.validation)
        shard_ends = np.cumsum([shard.size_bytes for shard in shards])
        num_before_tail = int(np.searchsorted(shard_ends, shard_ends[-1] * train_fraction, side="right"))
        if num_before_tail == 0:  # the tail begins in the first shard, for example the only file of a corpus
            texts = list(_training_texts(corpus, shards[0]))
            left_chars = min(limit_chars, int(sum(map(len, texts)) * train_fraction))
            for text in texts:
                yield text[:left_chars]
                left_chars = max(0, left_chars - len(text))
            return
        shards = shards[:num_before_tail]
    names = {shard: f"{shard.name}@{shard.start}" if shard.start else shard.name for shard in shards}
    left_chars = limit_chars
    for shard in sorted(shards, key=lambda shard: hash_to_unit(names[shard])):
        shard_chars = 0
        for text in _training_texts(corpus, shard):
            yield text
            shard_chars += len(text)
            if shard_chars >= min(_SAMPLE_SHARD_CHARS, left_chars):
                break
        left_chars -= shard_chars
        if left_chars <= 0:
            return


def _training_texts(corpus: Corpus, shard: SourceShard) -> Iterator[str]:
    processed = process_records(corpus, corpus.source.read(shard), corpus.format.to_documents, [])
    for split, _, documents in processed:
        if split == "train" and not _filter_reason(corpus, documents):
            yield record_text(documents)


class TextStoreBuilder(StoreBuilder[Corpus]):
    """Builds a store of text or of pairs."""

    stage = "tokens"

    def __init__(self, corpus: Corpus):
        """Reads an existing tokenizer; ConfigError if it or the template cannot be used, or not with each other."""
        self.corpus, config = corpus, corpus.tokenizer
        self.make_part = tokenize_job
        if corpus.dedup is not None:
            Signer(corpus.dedup)  # raises an error now if its package is missing
        if isinstance(config, TrainBpe):
            self._converted, special_tokens = None, {config.end_of_document, *config.special_tokens}
            tokenizer_digest = None  # not needed, because the recipe and the source determine the tokenizer
        else:
            self._converted = convert_tokenizer(config)
            tokenizer, _ = self._converted
            tokenizer_digest, special_tokens = tokenizer.sha256, tokenizer.special_tokens
        digests = [tokenizer_digest, corpus.format.template_digest()]
        self.input_digest = digest_of(digests) if any(digests) else None
        for token in corpus.format.required_special_tokens():
            if token not in special_tokens:
                raise ConfigError(
                    f"format: its template writes {token}, which is not a special token of the tokenizer, so any text "
                    "could contain it; add it to tokenizer.special_tokens, or use another template"
                )

    @override
    def setup(self, folder: Path, shards: Sequence[SourceShard]) -> None:
        """Trains the tokenizer, or checks one that was converted, and writes it beside the parts, unless it is there.

        Raises as `tokenize_job`, and ConfigError if the source shows that a converted tokenizer gives other tokens, or
        if the store of the validation split has another tokenizer or format.
        """
        corpus, info_path = self.corpus, folder / _INFO_FILE
        if not info_path.exists():
            if self._converted is None:
                tokenizer = train_bpe(_sample_texts(corpus, shards, TOKENIZER_TRAINING_CHARS), **vars(corpus.tokenizer))
            else:
                tokenizer, check_on = self._converted
                check_on(_sample_texts(corpus, shards, _CHECKED_CHARS))
            info = TokenizerInfo.from_tokenizer(tokenizer)
            write_bytes_atomic(folder / info.file, tokenizer.content)
            write_bytes_atomic(info_path, json.dumps(asdict(info)).encode())
        self._info = _read_info(folder)
        self._dtype = token_dtype(self._info.vocab_size)
        if isinstance(corpus.validation, OtherStore):
            corpus.validation.require_same(self._info, kind=corpus.format.kind, masked=corpus.format.has_loss_mask)

    @override
    def estimate_bytes(self, source_bytes: int) -> int:
        # Too low for compressed sources, documents of a few bytes, and text unlike the tokenizer's training text.
        bytes_per_token = 1 if self._info.vocab_size < _SMALL_VOCAB else _BYTES_PER_TOKEN
        record_format = self.corpus.format
        stored_bytes = self._dtype.itemsize + (1 if record_format.has_loss_mask else 0)  # of a token and its mask
        return 2 * source_bytes * record_format.documents_per_record * stored_bytes // bytes_per_token

    @override
    def assemble(self, folder: Path, num_parts: int, build: Path, source_digest: str) -> Manifest:
        corpus, masked = self.corpus, self.corpus.format.has_loss_mask
        source = PartSplits(folder=folder, num_parts=num_parts)
        if isinstance(corpus.validation, Tail):
            source = _split_tail(source, corpus, corpus.validation)
        keep, counts = select_documents(corpus, source, build)
        splits, packs = {}, {}
        names = ["lengths_D", "bytes_D", "tokens_N", *(["mask_N"] if masked else [])]
        for split in SPLITS:
            documents = source.read_kept(split, keep, *names)
            splits[split], lengths_D = write_split(build / split, self._dtype, documents, masked=masked)
            for pack in corpus.packs:
                packs[f"{split}/{pack.name}"] = write_pack(build, split, pack, lengths_D)
        shutil.copyfile(folder / self._info.file, build / self._info.file)
        manifest = Manifest(
            kind=corpus.format.kind,
            recipe=mask_tree(encode(corpus)),
            source_digest=source_digest,
            counts=counts,
            dtype=self._dtype.name,
            masked=masked,
            block=arrays.CHUNK,
            tokenizer=self._info,
            splits=splits,
            packs=packs,
            **common_fields(build),
        )
        if corpus.baselines:
            baselines, repeated = measure_baselines(TokenStore(ObjectStore(build), manifest))
            manifest = replace(manifest, baselines=baselines, counts=replace(counts, repeated=repeated))
        return manifest
