"""Random tokens on disk in three forms, for `bench data`: as they are, as a store, and as one record a window."""

import importlib
from pathlib import Path

import numpy as np

from jaxinfra.bench.reading import LENGTH, TYPE, Stores
from jaxinfra.data.packing import PackSpec
from jaxinfra.data.store import arrays
from jaxinfra.data.store.manifest import FILE_NAME, Counts, Manifest, Split
from jaxinfra.data.store.store import TOKENS, hash_files, info_of
from jaxinfra.data.tokenizer import Tokenizer
from jaxinfra.prepare.builders.assemble import SplitWriter, made_now, write_pack
from jaxinfra.prepare.tokenizers import Bytes, load

DOCUMENT = 500
"""Tokens of a document in the mean."""


def build(folder: Path, tokens: int, *, records: bool) -> Stores:
    """Writes documents of random tokens in all three forms; as records only if asked to."""
    stores = Stores(folder=folder, tokens=tokens)
    tokenizer, rng = load(Bytes()), np.random.default_rng(0)
    build_store(stores, tokenizer, rng)
    with stores.flat.open("wb") as file:
        array = arrays.open_array(stores.array, arrays.cache_context())
        for start in range(0, tokens, arrays.SHARD):
            array[start : min(start + arrays.SHARD, tokens)].read().result().tofile(file)
    if records:
        library = importlib.import_module("array_record.python.array_record_module")
        writer = library.ArrayRecordWriter(str(stores.records), "group_size:1")  # each is read by itself
        for window in stores.memmap()[::LENGTH]:
            writer.write(window.tobytes())
        writer.close()
    return stores


def build_store(stores: Stores, tokenizer: Tokenizer, rng: np.random.Generator) -> None:
    """Writes a version of a store as `data prepare` does, but for the text that it is of."""
    root, splits, packs = stores.store, {}, {}
    sizes: dict[Split, int] = {"train": stores.tokens, "validation": 2 * LENGTH}
    for split, size in sizes.items():
        writer = SplitWriter(root / split, np.dtype(TYPE), masked=False)
        for start in range(0, size, arrays.SHARD):
            block_N = rng.integers(0, tokenizer.eot_id, min(arrays.SHARD, size - start), TYPE)
            block_N[rng.random(len(block_N)) < 1 / DOCUMENT] = tokenizer.eot_id
            block_N[-1] = tokenizer.eot_id
            lengths_D = np.diff(np.flatnonzero(block_N == tokenizer.eot_id), prepend=-1)
            writer.add(block_N, lengths_D, None, len(block_N))
        splits[split] = writer.close()
        packs[f"{split}/{LENGTH}"] = write_pack(root, split, PackSpec(seq_len=LENGTH), writer.lengths)
    info = info_of(tokenizer)
    (root / info.file).write_bytes(tokenizer.content)
    manifest = Manifest(
        kind="text",
        recipe={},
        source_digest="",
        counts=Counts(),
        dtype=np.dtype(TYPE).name,
        block=arrays.CHUNK,
        tokenizer=info,
        splits=splits,
        packs=packs,
        files=hash_files(root, unhashed=(TOKENS,)),
        baselines={},
        **made_now(),
    )
    (root / FILE_NAME).write_bytes(manifest.to_bytes())
