"""`python -m launch bench data`: loads batches of random windows with jaxinfra and with other loaders.

All loaders read the same tokens from a warm file cache. In every round each loader is started anew and timed for half a
second after its first batches. CPU time includes all threads and processes of the loader.

Shape suffixes: N tokens, D documents.
"""

import argparse
import gc
import importlib
import importlib.util
import resource
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, override

import grain
import numpy as np
import tensorstore as ts
from absl import flags
from array_record.python.array_record_module import ArrayRecordWriter
from grain.sources import ArrayRecordDataSource

from jaxinfra.config import load
from jaxinfra.data.packing import PackSpec
from jaxinfra.data.store import arrays
from jaxinfra.data.store.manifest import FILE_NAME, Counts, Manifest, Split, TokenizerInfo
from jaxinfra.data.tokenizer import Tokenizer
from jaxinfra.inference.language_model import require_text
from jaxinfra.machine.peak_flops import PEAK_FLOPS
from jaxinfra.models.flops import flops_per_token
from jaxinfra.prepare.builders.writers import common_fields, write_pack, write_split
from jaxinfra.prepare.tokenizers import Bytes, convert_tokenizer
from jaxinfra.run import Run
from tests.bench.commands import call_without_jax
from tests.bench.loader import (
    BATCH_SIZE,
    SEQ_LEN,
    TOKEN_DTYPE,
    TokenFiles,
    WindowDataset,
    first_batch_s,
    jaxinfra_batches,
    memory_growth_bytes,
)
from tests.bench.table import BenchmarkResult, Columns, TableRow, format_table, median_ratio, time_rounds

DEFAULT_TOKENS = 200_000_000
MEAN_DOCUMENT_TOKENS = 500
MAX_ROUNDS = 15
ROUND_S = 0.5
WARMUP_BATCHES = 8
IN_FLIGHT = 4  # reads that `tensorstore_batches` starts before it waits for the first
GROWTH_BATCHES = 10_000
NUM_CHIPS, CHIP, MFU, MODEL = 64, "TPU v5p", 0.4, "configs/llama3_8b.py"  # the training run to load data for

type Loader = Callable[[TokenFiles], Generator[object, None, None]]

TENSORSTORE, JAXINFRA, GRAIN = "TensorStore alone", "jaxinfra", "Grain MapDataset, ArrayRecord"
COLUMNS: Columns = {
    "loader": ("loader", ""),
    "mtok_per_s": ("Mtok/s", "{:.1f}"),
    "cpu_ns": ("CPU ns per token", "{:.1f}"),
    "cores": (f"cores for {NUM_CHIPS} {CHIP}", "{:.4f}"),
    "vs_tensorstore": ("vs. TensorStore alone", "{:.2f}"),
    "vs_grain": ("vs. Grain", "{:.1f}"),
}


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
        documents = _random_documents(split_tokens, tokenizer.eot_id, rng)
        splits[split], lengths_D = write_split(root / split, np.dtype(TOKEN_DTYPE), documents, masked=False)
        packs[f"{split}/{SEQ_LEN}"] = write_pack(root, split, PackSpec(seq_len=SEQ_LEN), lengths_D)
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


def _random_documents(num_tokens: int, eot_id: int, rng: np.random.Generator) -> Iterator[tuple[np.ndarray, ...]]:
    """Yields lengths_D, bytes_D (one byte a token) and tokens_N of some documents at a time, as `write_split` takes."""
    for start in range(0, num_tokens, arrays.SHARD):
        tokens_N = rng.integers(0, eot_id, min(arrays.SHARD, num_tokens - start), TOKEN_DTYPE)
        # End-of-text tokens at random positions split the tokens into documents.
        tokens_N[rng.random(len(tokens_N)) < 1 / MEAN_DOCUMENT_TOKENS] = eot_id
        tokens_N[-1] = eot_id
        # End-of-text tokens at 3 and 7 end documents of 4 and 4 tokens.
        lengths_D = np.diff(np.flatnonzero(tokens_N == eot_id), prepend=-1)
        yield lengths_D, lengths_D, tokens_N


def memmap_batches(files: TokenFiles) -> Generator[np.ndarray, None, None]:
    """Copies windows out of a memory-mapped file; no loader of random windows can be faster."""
    windows, rng = files.windows_at_every_token(), np.random.default_rng(0)
    while True:
        yield windows[rng.integers(0, files.num_windows, BATCH_SIZE) * SEQ_LEN]


def tensorstore_batches(files: TokenFiles) -> Generator[np.ndarray, None, None]:
    """Reads each batch with one TensorStore read, and does nothing else with it."""
    array, rng = arrays.open_array(files.train_array), np.random.default_rng(0)
    reads: deque[ts.Future[np.ndarray]] = deque()
    while True:
        starts = (rng.integers(0, files.num_windows, BATCH_SIZE) * SEQ_LEN).tolist()
        with ts.Batch() as batch:
            windows = [array[start : start + SEQ_LEN + 1] for start in starts]
            reads.append(ts.concat(windows, axis=0).read(batch=batch))
        if len(reads) > IN_FLIGHT:
            yield reads.popleft().result().reshape(BATCH_SIZE, SEQ_LEN + 1)


class _Decode(grain.transforms.Map):
    @override
    def map(self, element: bytes) -> Any:
        return np.frombuffer(element, TOKEN_DTYPE)


def grain_map_dataset(files: TokenFiles) -> Generator[np.ndarray, None, None]:
    """Loads ArrayRecord with Grain's `MapDataset` and its default number of threads."""
    records: Any = ArrayRecordDataSource(str(files.records))
    dataset = grain.MapDataset.source(records).seed(0).shuffle().repeat().map(_Decode()).batch(BATCH_SIZE)
    with closing(iter(dataset.to_iter_dataset())) as batches:
        yield from batches


def grain_data_loader(files: TokenFiles) -> Generator[np.ndarray, None, None]:
    """Loads ArrayRecord with Grain's `DataLoader`, without worker processes."""
    records: Any = ArrayRecordDataSource(str(files.records))
    sampler = grain.samplers.IndexSampler(len(records), shuffle=True, seed=0)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads absl flags, which only absl.app.run would parse
    operations = [_Decode(), grain.transforms.Batch(BATCH_SIZE)]
    yield from grain.DataLoader(data_source=records, sampler=sampler, operations=operations, worker_count=0)


def torch_data_loader(files: TokenFiles, *, num_workers: int) -> Generator[object, None, None]:
    """Loads the memory-mapped flat file with PyTorch's `DataLoader`."""
    loader = importlib.import_module("torch.utils.data").DataLoader
    dataset = WindowDataset(files)
    batches = loader(dataset, batch_size=BATCH_SIZE, shuffle=True, num_workers=num_workers, drop_last=True)
    while True:
        yield from batches


def installed_loaders() -> dict[str, Loader]:
    """Returns all loaders with installed packages, by name."""
    loaders: dict[str, Loader] = {
        "memmap, gathered": memmap_batches,
        TENSORSTORE: tensorstore_batches,
        JAXINFRA: partial(jaxinfra_batches, mask_documents=False),
        f"{JAXINFRA}, documents masked": jaxinfra_batches,
        f"{JAXINFRA}, whole documents packed": partial(jaxinfra_batches, packing="best_fit"),
        GRAIN: grain_map_dataset,
        "Grain DataLoader, ArrayRecord": grain_data_loader,
    }
    if importlib.util.find_spec("torch"):
        for n in (0, 1, 2):
            loaders[f"PyTorch DataLoader, memmap, {n} workers"] = partial(torch_data_loader, num_workers=n)
    return loaders


def cpu_s() -> float:
    """Returns the CPU seconds of this process and of its ended child processes."""
    usages = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def time_loader(loader: Loader, files: TokenFiles, number: int) -> tuple[float, float]:
    """Starts a loader and reads for `ROUND_S`, whatever the round; returns tokens/s and CPU nanoseconds per token."""
    gc.collect()
    start_cpu_s = cpu_s()
    with closing(loader(files)) as batches:
        for _ in range(WARMUP_BATCHES):
            next(batches)
        start_s, elapsed_s, num_batches = time.perf_counter(), 0.0, 0
        while elapsed_s < ROUND_S:
            next(batches)
            num_batches += 1
            elapsed_s = time.perf_counter() - start_s
    batch_tokens = BATCH_SIZE * SEQ_LEN
    cpu_ns = 1e9 * (cpu_s() - start_cpu_s)
    return num_batches * batch_tokens / elapsed_s, cpu_ns / ((num_batches + WARMUP_BATCHES) * batch_tokens)


def required_tokens_per_s() -> float:
    """Returns the tokens per second that `NUM_CHIPS` chips train `MODEL` on, at `MFU` of their peak FLOP/s."""
    model, data = require_text(load(MODEL, root=Run).run)
    return NUM_CHIPS * PEAK_FLOPS[CHIP] * MFU / flops_per_token(model, data.seq_len)


def time_loaders(files: TokenFiles, num_rounds: int) -> Iterator[TableRow]:
    """Times all loaders round by round; the first round is warm-up."""
    sides = {name: partial(time_loader, loader, files) for name, loader in installed_loaders().items()}
    found = time_rounds(sides, num_rounds)
    speeds = {name: [speed for speed, _ in times] for name, times in found.items()}  # tokens per second in each round
    required = required_tokens_per_s()
    for name, speed in speeds.items():
        cpu_ns = median(cpu_ns for _, cpu_ns in found[name])
        yield {
            "loader": name,
            "mtok_per_s": median(speed) / 1e6,
            "cpu_ns": cpu_ns,
            "cores": 1e-9 * cpu_ns * required,  # busy cores that load `required` tokens per second
            "vs_tensorstore": median_ratio(speed, speeds[TENSORSTORE]),
            "vs_grain": median_ratio(speed, speeds[GRAIN]),
        }


def run(options: argparse.Namespace) -> BenchmarkResult:
    """Measures the parts that `--only` names, or all."""
    num_tokens, num_rounds = options.tokens or DEFAULT_TOKENS, min(options.pairs, MAX_ROUNDS)
    measurements: dict[str, object] = {"tokens": num_tokens, "rounds": num_rounds}
    lines: list[str] = []
    with tempfile.TemporaryDirectory(prefix="jaxinfra-bench-") as folder:
        print(f"writing {num_tokens:,} tokens ...", file=sys.stderr, flush=True)
        files = write_token_files(Path(folder), num_tokens)
        for part in options.only or ("speed", "first", "memory"):
            print(f"measuring {part} ...", file=sys.stderr, flush=True)
            if part == "speed":
                measurements["rows"] = rows = list(time_loaders(files, num_rounds))
                lines.append(format_table(COLUMNS, rows))
            elif part == "first":
                times_s = [call_without_jax(first_batch_s, files, time.time()) for _ in range(num_rounds + 1)]
                measurements["first_batch_s"] = first_s = median(times_s[1:])
                lines.append(
                    f"First batch {first_s:.2f} s after the start of a process, imports included, "
                    "without importing JAX (goal < 1 s)."
                )
            else:
                growth_bytes = call_without_jax(memory_growth_bytes, files, GROWTH_BATCHES)
                measurements["growth_bytes"] = growth_bytes
                lines.append(f"Memory grows {growth_bytes / 1e6:.1f} MB over {GROWTH_BATCHES:,} batches (goal < 50).")
    sizes = f"{num_tokens:,} tokens, windows of {SEQ_LEN:,}, batches of {BATCH_SIZE}"
    return BenchmarkResult(
        text="\n".join(lines), note=f"{sizes}; medians of {num_rounds} rounds", measurements=measurements
    )
