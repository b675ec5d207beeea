"""Making a store of text: the tokenizer first, then tokens in parallel, then arrays, packings and baselines."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from jaxinfra.config import encode
from jaxinfra.data.store import arrays
from jaxinfra.data.store.manifest import SPLITS, Kind, Manifest, Split, SplitInfo, digest_of
from jaxinfra.data.store.store import MASK, TOKENS, TokenStore, hash_files, info_of, token_dtype
from jaxinfra.errors import ConfigError
from jaxinfra.prepare.builders import assemble
from jaxinfra.prepare.builders.assemble import Keep, SplitWriter
from jaxinfra.prepare.builders.baseline import measured
from jaxinfra.prepare.builders.job import Job
from jaxinfra.prepare.builders.splits import Splits, with_tail
from jaxinfra.prepare.builders.tokenize import (
    TOKENIZER_INFO,
    load_tokenizer,
    make_part,
    read_info,
    sample_texts,
    tokenise,
)
from jaxinfra.prepare.parts import Part
from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.recipes.validation import OtherStore, Tail
from jaxinfra.prepare.sources.record import Piece
from jaxinfra.prepare.sources.stream import Block
from jaxinfra.prepare.tokenizers import TrainBpe, convert, train_bpe
from jaxinfra.storage.atomic import replace_bytes
from jaxinfra.storage.objects import Storage

TOKENIZER_BYTES = 12_000_000
"""Text that a tokenizer is trained on: more changes an 8k vocabulary little and costs time and memory."""
_BYTES_PER_TOKEN = 2  # low for a trained vocabulary, which has 3 to 4; so the estimate of the space is high
_CHECKED_CHARS = 200_000  # of the source that a converted tokenizer is tried on: seconds
_FEW_WORDS = 512  # a byte-level BPE of fewer has less than 2.1 bytes a token, on its own text; that of bytes has 1


class TextMaker:
    """What preparing a corpus has of its own."""

    stage = "tokens"
    job = staticmethod(tokenise)

    def __init__(self, corpus: Corpus):
        """Reads the tokenizer, where the recipe names an existing one.

        Raises:
            ConfigError: it cannot be read; or the template of the form does not go with it, or cannot be used.
        """
        self._corpus = corpus
        config = corpus.tokenizer
        self._given, self._check = (None, None) if isinstance(config, TrainBpe) else convert(config)
        self._check_markers()

    @property
    def identity(self) -> str | None:
        """Of the files that the recipe names; a tokenizer that is trained follows from all else."""
        found = [self._given and self._given.sha256, self._corpus.form.identity()]
        return digest_of(found) if any(found) else None

    def begin(self, folder: Path, pieces: Sequence[Piece]) -> None:
        """Puts the tokenizer beside the parts; one that is trained is trained once, one that was converted is checked.

        `pieces` are of the training source, the same ones whatever the recipe says of shards.

        Raises:
            ConfigError: a converted tokenizer gives texts of the source other tokens; or the store that the validation
                split is of has another tokenizer or form.
            DataError: a record cannot be read and the recipe does not skip it.
        """
        corpus, known = self._corpus, folder / TOKENIZER_INFO
        if not known.exists():
            given, config = self._given, corpus.tokenizer
            if isinstance(config, TrainBpe):
                given = train_bpe(sample_texts(corpus, pieces, TOKENIZER_BYTES), **vars(config))
            assert given is not None
            if self._check is not None:
                self._check(sample_texts(corpus, pieces, _CHECKED_CHARS))
            info = info_of(given)
            replace_bytes(folder / info.file, given.content)
            replace_bytes(known, json.dumps(asdict(info)).encode())
        self._info = read_info(folder)
        self._dtype = token_dtype(self._info.vocab_size)
        if isinstance(corpus.validation, OtherStore):
            corpus.validation.require_same(self._info, kind=self._kind, masked=corpus.form.masked)

    def part(self, folder: Path, block: Block) -> Part:
        """Makes the part of a block of a stream; after `begin`."""
        job = Job(number=0, pieces=(), recipe=self._corpus, folder=str(folder))
        part = make_part(job, load_tokenizer(folder, self._info), block.records, read_bytes=block.read_bytes)
        return replace(part, position=block.position)

    def needed_bytes(self, source_bytes: int) -> int:
        """Parts and arrays exist at once, and a byte of the mask beside each token.

        An estimate: low for compressed sources, for documents of a few bytes, and for a text that the tokenizer was not
        trained for.
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
        corpus, form = self._corpus, self._corpus.form
        source = Splits(folder=folder, numbers=numbers)
        if isinstance(corpus.validation, Tail):
            tokenizer = None if form.masked or form.group > 1 else load_tokenizer(folder, self._info)
            source = with_tail(
                source, corpus.validation.fraction, group=form.group, tokenizer=tokenizer, dedup=corpus.dedup
            )
        keep, counts = assemble.kept(corpus, source, build, group=form.group, dedup=corpus.dedup)
        splits, packs = {}, {}
        for split in SPLITS:
            writer = SplitWriter(build / split, self._dtype, masked=form.masked)
            splits[split] = _copy(source, split, keep, writer)
            for pack in corpus.packs:
                packs[f"{split}/{pack.name}"] = assemble.write_pack(build, split, pack, writer.lengths)
        shutil.copyfile(folder / self._info.file, build / self._info.file)
        manifest = Manifest(
            kind=self._kind,
            recipe=encode(corpus),
            source_digest=source_digest,
            counts=counts,
            dtype=self._dtype.name,
            masked=form.masked,
            block=arrays.CHUNK,
            tokenizer=self._info,
            splits=splits,
            packs=packs,
            files=hash_files(build, unhashed=(TOKENS, MASK)),
            baselines={},
            **assemble.made_now(),
        )
        if corpus.baselines:
            manifest = replace(manifest, baselines=measured(TokenStore(Storage(build), manifest)))
        return manifest

    @property
    def _kind(self) -> Kind:
        return "text" if self._corpus.form.group == 1 else "pairs"

    def _check_markers(self) -> None:
        """Refuses a template whose special tokens are none of the tokenizer: then any text could spell them."""
        config = self._corpus.tokenizer
        if isinstance(config, TrainBpe):
            special = {config.end_of_document, *config.special_tokens}
        else:
            special = self._given.special if self._given else {}
        for marker in self._corpus.form.markers():
            if marker not in special:
                raise ConfigError(
                    f"form: its template writes {marker}, which is no special token of the tokenizer, so that any text "
                    "could spell it; name it in tokenizer.special_tokens, or use another template"
                )


def _copy(splits: Splits, split: Split, keep: Keep, writer: SplitWriter) -> SplitInfo:
    """Writes the documents of parts that stay."""
    names = ("tokens_N", "lengths_D", "bytes_D", *(("mask_N",) if writer.masked else ()))
    for (tokens_N, lengths_D, bytes_D, *masks), keep_D in zip(splits.read(split, *names), keep[split], strict=True):
        if not keep_D.all():
            keep_N = np.repeat(keep_D, lengths_D)
            tokens_N, masks = tokens_N[keep_N], [mask_N[keep_N] for mask_N in masks]
            lengths_D, bytes_D = lengths_D[keep_D], bytes_D[keep_D]
        writer.add(tokens_N, lengths_D, masks[0] if masks else None, int(bytes_D.sum()))
    return writer.close()
