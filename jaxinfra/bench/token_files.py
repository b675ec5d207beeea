"""Writes random tokens for `bench data` as a flat file, as a jaxinfra store and as ArrayRecord."""

from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from jaxinfra.bench.loader import SEQ_LEN, TOKEN_DTYPE, TokenFiles
from jaxinfra.data.packing import PackSpec
from jaxinfra.data.store import arrays
from jaxinfra.data.store.manifest import FILE_NAME, Counts, Manifest, Split, TokenizerInfo
from jaxinfra.data.tokenizer import Tokenizer
from jaxinfra.prepare.builders.writers import SplitWriter, common_fields, write_pack
from jaxinfra.prepare.tokenizers import Bytes, convert_tokenizer

MEAN_DOCUMENT_TOKENS = 500


def write_token_files(folder: Path, num_tokens: int) -> TokenFiles:
    """Writes documents of random tokens."""
    files = TokenFiles(folder, num_tokens)
    write_store(files, convert_tokenizer(Bytes())[0], np.random.default_rng(0))
    with files.flat.open("wb") as file:
        array = arrays.open_array(files.train_array)
        for start in range(0, num_tokens, arrays.SHARD):
            array[start : min(start + arrays.SHARD, num_tokens)].read().result().tofile(file)
    writer = ArrayRecordWriter(str(files.records), "group_size:1")  # each record can be read alone
    for window in files.windows_at_every_token()[::SEQ_LEN]:
        writer.write(window.tobytes())
    writer.close()
    return files


def write_store(files: TokenFiles, tokenizer: Tokenizer, rng: np.random.Generator) -> None:
    """Writes a store as `data prepare` does, but with random tokens in documents of random length."""
    root, splits, packs = files.store, {}, {}
    num_tokens: dict[Split, int] = {"train": files.num_tokens, "validation": 2 * SEQ_LEN}
    for split, split_tokens in num_tokens.items():
        writer = SplitWriter(root / split, np.dtype(TOKEN_DTYPE), masked=False)
        for start in range(0, split_tokens, arrays.SHARD):
            tokens_N = rng.integers(0, tokenizer.eot_id, min(arrays.SHARD, split_tokens - start), TOKEN_DTYPE)
            # End-of-text tokens at random positions split the tokens into documents.
            tokens_N[rng.random(len(tokens_N)) < 1 / MEAN_DOCUMENT_TOKENS] = tokenizer.eot_id
            tokens_N[-1] = tokenizer.eot_id
            # End-of-text tokens at 3 and 7 end documents of 4 and 4 tokens.
            lengths_D = np.diff(np.flatnonzero(tokens_N == tokenizer.eot_id), prepend=-1)
            writer.add(tokens_N, lengths_D, None, len(tokens_N))
        splits[split] = writer.close()
        packs[f"{split}/{SEQ_LEN}"] = write_pack(root, split, PackSpec(seq_len=SEQ_LEN), writer.lengths)
    info = TokenizerInfo.from_tokenizer(tokenizer)
    (root / info.file).write_bytes(tokenizer.content)
    manifest = Manifest(
        kind="text",
        recipe={},
        source_digest="",
        counts=Counts(),
        dtype=np.dtype(TOKEN_DTYPE).name,
        block=arrays.CHUNK,
        tokenizer=info,
        splits=splits,
        packs=packs,
        **common_fields(root),
    )
    (root / FILE_NAME).write_bytes(manifest.to_bytes())
