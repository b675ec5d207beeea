"""Builds a store of text: first the tokenizer, then tokens in parallel, then arrays, packings and baselines.

A job reads some shards, makes documents of their records, tokenizes them and commits a part. The part depends only on
the job, so any worker may make it at any time, even twice.
"""

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
from jaxinfra.data.store.manifest import SPLITS, Kind, Manifest, Split, TokenizerInfo, digest_of
from jaxinfra.data.store.store import TokenStore, token_dtype
from jaxinfra.data.tokenizer import Tokenizer, load_tokenizer
from jaxinfra.errors import ConfigError, DataError
from jaxinfra.prepare import parts
from jaxinfra.prepare.builders.baseline import measure_baselines
from jaxinfra.prepare.builders.job import PrepareJob, StoreBuilder, process_records
from jaxinfra.prepare.builders.select import select_documents
from jaxinfra.prepare.builders.tail import split_tail
from jaxinfra.prepare.builders.writers import SplitWriter, common_fields, write_pack
from jaxinfra.prepare.documents.dedup import Signer
from jaxinfra.prepare.documents.document import Document
from jaxinfra.prepare.documents.encoding import EncodedDocument, encode_documents
from jaxinfra.prepare.documents.shingles import hash128
from jaxinfra.prepare.parts import Arrays, Part, PartMetadata, PartSplits
from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.recipes.validation import OtherStore, Tail, hash_to_unit
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
_BYTES_PER_TOKEN = 2  # a trained vocabulary has 3 to 4; a low value makes the estimate of disk space safe
_CHECKED_CHARS = 200_000  # characters of the source to compare a converted tokenizer on; takes seconds
_SMALL_VOCAB = 512  # a byte-level BPE with fewer tokens has less than 2.1 bytes per token on its own text


def tokenize_job(job: PrepareJob[Corpus]) -> PartMetadata:
    """Makes and commits the part of a job.

    Raises:
        DataError: a bad record, and the recipe does not skip them.
        StorageError: the source cannot be read; OSError: the part cannot be written.
    """
    folder, validation = Path(job.folder), job.recipe.validation
    builder = _PartBuilder(job.recipe, _load_tokenizer(folder, _read_info(folder)))
    if job.validation and isinstance(validation, OtherStore):
        for shard in job.shards:
            builder.copy_documents(validation, shard)
    else:
        builder.add_records(job.read_records(), validation=job.validation)
    return parts.write_part(folder, job.number, builder.finish(read_bytes=job.read_bytes))


def _read_info(folder: Path) -> TokenizerInfo:
    return TokenizerInfo(**json.loads((folder / _INFO_FILE).read_bytes()))


@lru_cache(maxsize=2)
def _load_tokenizer(folder: Path, info: TokenizerInfo) -> Tokenizer:
    """Loads the tokenizer beside the parts; cached, so that a worker loads it once."""
    path = folder / info.file
    return load_tokenizer(info.kind, path.read_bytes(), info.end_of_document, name=str(path))


class _PartBuilder:
    """Makes a part from records, or from documents of another store."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer):
        self._corpus = corpus
        self._splits: dict[Split, _SplitBuilder] = {split: _SplitBuilder(corpus, tokenizer) for split in SPLITS}
        self._num_kept = 0  # records
        self._skipped: list[tuple[str, str]] = []
        self._filtered = Counter[str]()

    def add_records(self, records: Records, *, validation: bool = False) -> None:
        """Adds all records; `validation` puts all into the validation split. Raises as `tokenize_job`."""
        corpus, to_documents = self._corpus, self._corpus.format.to_documents
        processed = process_records(corpus, records, to_documents, self._skipped, validation=validation)
        for split, location, documents in processed:
            if reason := _filter_reason(corpus, documents):
                self._filtered[reason] += 1
            else:
                self._splits[split].add(location, documents)
                self._num_kept += 1

    def copy_documents(self, other: OtherStore, shard: SourceShard) -> None:
        """Copies the tokens of a range of records of another store."""
        store, per_record = other.open(shard.name), self._corpus.format.documents_per_record
        end = store.manifest.splits[other.split].documents if shard.end is None else shard.end * per_record
        first = shard.start * per_record  # document
        lengths_D = store.read_ranges(other.split, LENGTHS, np.array([first]), np.array([end - first]))
        offset = store.read_ranges(other.split, OFFSETS, np.array([first]), np.array([1]))
        tokens_N, mask_N = store.read_with_mask(other.split, offset, lengths_D.sum(keepdims=True))
        in_loss_N = np.ones(len(tokens_N), bool) if mask_N is None else mask_N.astype(bool)
        ends_D = np.cumsum(lengths_D)
        for number, start, stop in zip(range(first, end), ends_D - lengths_D, ends_D - 1, strict=True):
            ids_N = tokens_N[start:stop].astype(np.int64)  # without the end token
            self._splits["validation"].copy(f"{other.store} document {number}", ids_N, in_loss_N[start:stop])
        self._num_kept += (end - first) // per_record

    def finish(self, *, read_bytes: int, position: Position | None = None) -> Part:
        """Returns the part; `position` is that of a stream after the last record."""
        splits: dict[Split, Arrays] = {split: builder.finish() for split, builder in self._splits.items()}
        metadata = PartMetadata(
            tokens=sum(len(arrays["tokens_N"]) for arrays in splits.values()),
            records=self._num_kept + len(self._skipped) + self._filtered.total(),
            read_bytes=read_bytes,
            skipped=tuple(self._skipped),
            filtered=self._filtered,
            position=position or {},
        )
        return Part(metadata=metadata, splits=splits)


def _filter_reason(corpus: Corpus, documents: Sequence[Document]) -> str | None:
    """Returns why the filters leave out a record with these documents; None if all of them pass."""
    reasons = (corpus.filters.reason(_record_text([document])) for document in documents)
    return next(filter(None, reasons), None)


class _SplitBuilder:
    """Tokenizes documents of one split in batches."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer):
        self._corpus, self._tokenizer, self._dtype = corpus, tokenizer, token_dtype(tokenizer.vocab_size)
        self._signer = None if corpus.dedup is None else Signer(corpus.dedup)
        self._waiting: list[Document] = []  # to be tokenized
        self._waiting_chars = 0
        self._encoded: list[EncodedDocument] = []  # with their end tokens
        self._locations: list[str] = []
        self._signatures: list[tuple[np.ndarray, np.ndarray | None]] = []

    def add(self, location: str, documents: Sequence[Document]) -> None:
        """Adds the documents of a record."""
        self._add_signatures(location, _record_text(documents), len(documents))
        self._waiting += documents
        self._waiting_chars += sum(len(span.text) for document in documents for span in document)
        if self._waiting_chars >= _BATCH_CHARS:
            self._encode_waiting()

    def copy(self, location: str, ids_N: np.ndarray, in_loss_N: np.ndarray) -> None:
        """Adds a document that is tokenized already."""
        text = self._tokenizer.decode(ids_N.tolist())
        self._add_signatures(location, text, 1)
        self._add_encoded(EncodedDocument(ids_N=ids_N, in_loss_N=in_loss_N, num_bytes=len(text.encode())))

    def finish(self) -> Arrays:
        """Returns the arrays of a part for D documents with N tokens.

        Always `tokens_N`, each document with its end token; `lengths_D`, tokens of each; `bytes_D`, bytes of its text;
        `digest_D2`, the hash of its tokens. If the format is masked, `mask_N`, 1 for tokens in the loss. With dedup,
        `exact_D2` and `near_DP`, the signatures of each text. If an overlap is an error, `where_D`, the locations.
        """
        self._encode_waiting()
        encoded, dedup = self._encoded, self._corpus.dedup
        part = {
            "tokens_N": np.concatenate([np.empty(0, self._dtype), *(each.ids_N for each in encoded)]),
            "lengths_D": np.array([len(each.ids_N) for each in encoded], np.int64),
            "bytes_D": np.array([each.num_bytes for each in encoded], np.int64),
            "digest_D2": np.array([hash128(each.ids_N.data) for each in encoded], np.uint64).reshape(-1, 2),
        }
        if self._corpus.format.has_loss_mask:
            masks = [each.in_loss_N for each in encoded]
            part["mask_N"] = np.concatenate([np.empty(0, bool), *masks]).astype(np.uint8)
        if dedup is not None:
            part["exact_D2"] = np.array([exact for exact, _ in self._signatures], np.uint64).reshape(-1, 2)
        if dedup is not None and dedup.near:
            near = [near for _, near in self._signatures]
            part["near_DP"] = np.array(near, np.uint32).reshape(-1, dedup.num_permutations)
        if self._corpus.on_overlap == "fail":
            part["where_D"] = np.array(self._locations, np.str_)
        return part

    def _add_signatures(self, location: str, text: str, count: int) -> None:
        """Adds the location and the signatures of a record for each of its `count` documents."""
        self._locations += [location] * count
        if self._signer is not None:
            self._signatures += [self._signer(text)] * count

    def _add_encoded(self, document: EncodedDocument) -> None:
        """Adds the tokens of a document, and its end token."""
        ids_N = np.append(document.ids_N, self._tokenizer.eot_id).astype(self._dtype)
        mask_N = np.append(document.in_loss_N, False) if self._corpus.format.has_loss_mask else np.empty(0, bool)
        self._encoded.append(replace(document, ids_N=ids_N, in_loss_N=mask_N))

    def _encode_waiting(self) -> None:
        vocab_size = self._tokenizer.vocab_size
        for document in encode_documents(self._tokenizer, self._waiting):
            wrong = document.ids_N[(document.ids_N < 0) | (document.ids_N >= vocab_size)]
            if wrong.size:  # the token dtype could not hold it
                cause = f"the tokenizer gave it, but its vocabulary has only {vocab_size} tokens"
                raise DataError(f"token id {wrong[0]}: {cause}; use another tokenizer file")
            self._add_encoded(document)
        self._waiting, self._waiting_chars = [], 0


def _record_text(documents: Sequence[Document]) -> str:
    """Returns the text of the record, without what the template adds."""
    return "".join(span.text for document in documents for span in document if not span.from_template)


def _sample_texts(corpus: Corpus, shards: Sequence[SourceShard], limit_chars: int) -> Iterator[str]:
    """Yields about `limit_chars` of training text, without a validation tail. Raises as `tokenize_job`.

    Shards come in the order of their hashed names, which gives a fair sample that changes little when files are added.
    At most about `_SAMPLE_SHARD_CHARS` come from one shard.
    """
    if isinstance(corpus.validation, Tail):
        train_fraction = 1 - corpus.validation.fraction
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
            yield _record_text(documents)


class TextStoreBuilder(StoreBuilder[Corpus]):
    """Builds a store of text or of pairs."""

    stage = "tokens"

    def __init__(self, corpus: Corpus):
        """Reads an existing tokenizer; ConfigError if it or the template cannot be used, or not with each other."""
        self._corpus, config = corpus, corpus.tokenizer
        self.make_part = tokenize_job
        if isinstance(config, TrainBpe):
            self._converted, special_tokens = None, {config.end_of_document, *config.special_tokens}
            tokenizer_digest = None  # not needed, because the recipe and the source determine the tokenizer
        else:
            self._converted = convert_tokenizer(config)
            tokenizer, _ = self._converted
            tokenizer_digest, special_tokens = tokenizer.sha256, tokenizer.special_tokens
        digests = [tokenizer_digest, corpus.format.template_digest()]
        self.input_digest = digest_of(digests) if any(digests) else None
        self._kind: Kind = "text" if corpus.format.documents_per_record == 1 else "pairs"
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
        corpus, info_path = self._corpus, folder / _INFO_FILE
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
            corpus.validation.require_same(self._info, kind=self._kind, masked=corpus.format.has_loss_mask)

    def part_of_batch(self, folder: Path, batch: StreamBatch) -> Part:
        """Makes the part of a batch of a stream, after `setup`."""
        builder = _PartBuilder(self._corpus, _load_tokenizer(folder, self._info))
        builder.add_records(iter(batch.records))
        return builder.finish(read_bytes=batch.read_bytes, position=batch.position)

    @override
    def estimate_bytes(self, source_bytes: int) -> int:
        # Too low for compressed sources, documents of a few bytes, and text unlike the tokenizer's training text.
        bytes_per_token = 1 if self._info.vocab_size < _SMALL_VOCAB else _BYTES_PER_TOKEN
        record_format = self._corpus.format
        stored_bytes = self._dtype.itemsize + record_format.has_loss_mask  # of a token; a mask has one byte
        return 2 * source_bytes * record_format.documents_per_record * stored_bytes // bytes_per_token

    @override
    def assemble(self, folder: Path, num_parts: int, build: Path, source_digest: str) -> Manifest:
        corpus, masked = self._corpus, self._corpus.format.has_loss_mask
        source = PartSplits(folder=folder, num_parts=num_parts)
        if isinstance(corpus.validation, Tail):
            source = split_tail(source, corpus, corpus.validation, _load_tokenizer(folder, self._info))
        keep, counts = select_documents(corpus, source, build)
        splits, packs = {}, {}
        names = ("lengths_D", "bytes_D", "tokens_N", "mask_N")[: None if masked else 3]
        for split in SPLITS:
            writer = SplitWriter(build / split, self._dtype, masked=masked)
            for lengths_D, bytes_D, tokens_N, *mask in source.read_kept(split, keep, *names):
                writer.add(tokens_N, lengths_D, mask[0] if masked else None, int(bytes_D.sum()))
            splits[split] = writer.close()
            for pack in corpus.packs:
                packs[f"{split}/{pack.name}"] = write_pack(build, split, pack, writer.lengths)
        shutil.copyfile(folder / self._info.file, build / self._info.file)
        manifest = Manifest(
            kind=self._kind,
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
            manifest = replace(manifest, baselines=measure_baselines(TokenStore(ObjectStore(build), manifest)))
        return manifest
