"""`python -m launch bench prepare`: compares how fast `data prepare` and `datasets.map` tokenize text.

Both use the same text, tokenizer and number of workers, with one thread a worker. Every measurement is a process of its
own. `prepare` is timed from listing the files to the published store, `map` from texts in memory to tokens on disk.
"""

import argparse
import importlib.util
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

from tokenizers import Tokenizer

from jaxinfra.prepare.prepare import prepare
from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.sources.record import Record
from jaxinfra.prepare.sources.text import TextFiles
from jaxinfra.prepare.tokenizers import TokenizerFile, train_bpe
from tests.bench.commands import call_in_process
from tests.bench.table import BenchmarkResult, Columns, TableRow, format_table, median_ratio

PREPARE, MAP = "prepare", "map"
TITLES = {PREPARE: "data prepare", MAP: "datasets.map"}
NUM_WORKERS = (1, 2)
MAX_ROUNDS = 5
VOCAB_SIZE = 8192
ONE_THREAD = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # per worker; tokenizers reads them
COLUMNS: Columns = {
    "side": ("tokenized by", ""),
    "median_s": ("s", "{:.2f}"),
    "mb_per_s": ("MB/s", "{:.2f}"),
    "mtok_per_s": ("Mtok/s", "{:.2f}"),
    "vs_one_worker": ("vs. one worker", "{:.2f}"),
    "vs_map": ("vs. datasets.map", "{:.2f}"),
}
GOALS = "Goals: two workers are 1.6 times as fast as one, and data prepare is at least as fast as datasets.map."


@dataclass(frozen=True, kw_only=True)
class TokenizeCase:
    """One timed case: a tool, "prepare" or "map", and its number of workers."""

    tool: str
    num_workers: int

    @property
    def title(self) -> str:
        """The first cell of its row."""
        return f"{TITLES[self.tool]}, {self.num_workers} worker{'s' if self.num_workers > 1 else ''}"


def make_cases(tools: Sequence[str] | None) -> list[TokenizeCase]:
    """Returns the cases of these tools; None selects every installed tool."""
    if tools is None:
        tools = [PREPARE, MAP] if importlib.util.find_spec("datasets") else [PREPARE]
    return [TokenizeCase(tool=tool, num_workers=n) for tool in tools for n in NUM_WORKERS]


def read_texts(source: TextFiles) -> list[str]:
    """Reads all files; files that cannot be decoded are left out."""
    shards = source.list_shards(1 << 40)  # a shard size in bytes that splits no file
    records = (record for shard in shards for record in source.read(shard))
    return [record.fields["text"] for record in records if isinstance(record, Record)]


def time_prepare(source: TextFiles, tokenizer_path: Path, num_workers: int) -> float:
    """Returns the seconds of `data prepare`."""
    with tempfile.TemporaryDirectory(prefix="jaxinfra-bench-") as folder:
        tokenizer = TokenizerFile(path=str(tokenizer_path))
        recipe = Corpus(store=f"{folder}/store", source=source, tokenizer=tokenizer, on_bad="skip")
        start_s = time.perf_counter()
        prepare(recipe, workers=num_workers)
        return time.perf_counter() - start_s


def encode_batch(tokenizer: Tokenizer, batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
    """Tokenizes a batch for `datasets.map`; at module level, so that workers can unpickle it."""
    return {"ids": [each.ids for each in tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False)]}


def time_map(source: TextFiles, tokenizer_path: Path, num_workers: int) -> float:
    """Returns the seconds of `datasets.map`."""
    import datasets

    datasets.disable_progress_bars()
    documents = datasets.Dataset.from_dict({"text": read_texts(source)})
    encode = partial(encode_batch, Tokenizer.from_file(str(tokenizer_path)))
    with tempfile.TemporaryDirectory(prefix="jaxinfra-bench-") as folder:
        start_s = time.perf_counter()
        documents.map(
            encode,
            batched=True,
            num_proc=num_workers if num_workers > 1 else None,
            remove_columns=["text"],
            cache_file_name=f"{folder}/tokens.arrow",
        )
        return time.perf_counter() - start_s


def run(options: argparse.Namespace) -> BenchmarkResult:
    """Times all cases, round by round."""
    source = TextFiles(root=options.text or "stdlib", pattern="**/*" if options.text else "**/*.py")
    texts = read_texts(source)
    n_bytes, num_rounds = sum(len(text.encode()) for text in texts), min(options.pairs, MAX_ROUNDS)
    times_s: dict[TokenizeCase, list[float]] = {case: [] for case in make_cases(options.only)}
    with tempfile.TemporaryDirectory(prefix="jaxinfra-bench-") as folder:
        path = Path(folder) / "tokenizer.json"
        tokenizer = train_bpe(texts, vocab_size=VOCAB_SIZE, end_of_document="<|endoftext|>")
        path.write_bytes(tokenizer.content)
        num_tokens = sum(map(len, tokenizer.encode_batch(texts)))
        for round_number in range(1, num_rounds + 1):
            for case in times_s:
                print(f"round {round_number} of {num_rounds}: {case.title} ...", file=sys.stderr, flush=True)
                time_tool = time_prepare if case.tool == PREPARE else time_map
                times_s[case].append(call_in_process(time_tool, ONE_THREAD, source, path, case.num_workers))
    rows = list(make_rows(times_s, n_bytes, num_tokens))
    note = f"{len(texts):,} files, {n_bytes / 1e6:.1f} MB, {num_tokens:,} tokens; medians of {num_rounds} rounds"
    return BenchmarkResult(text=f"{format_table(COLUMNS, rows)}\n\n{GOALS}", note=note, measurements={"rows": rows})


def make_rows(times_s: dict[TokenizeCase, list[float]], n_bytes: int, num_tokens: int) -> Iterator[TableRow]:
    """Yields a row per case; ratios are medians of the ratios of the rounds."""

    def speedup(case: TokenizeCase, other: TokenizeCase) -> float | None:
        """Returns how much faster a case is than another; None if that is the same case, or was not timed."""
        return median_ratio(times_s[other], times_s[case]) if other in times_s and other != case else None

    for case, case_times_s in times_s.items():
        yield {
            "side": case.title,
            "median_s": median(case_times_s),
            "mb_per_s": n_bytes / 1e6 / median(case_times_s),
            "mtok_per_s": num_tokens / 1e6 / median(case_times_s),
            "vs_one_worker": speedup(case, replace(case, num_workers=1)),
            "vs_map": speedup(case, replace(case, tool=MAP)),
        }
