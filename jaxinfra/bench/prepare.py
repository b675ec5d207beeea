"""`python -m launch bench prepare`: tokens from text, by `data prepare` and by `datasets.map`, with one worker and two.

The same text, the same tokenizer, one thread a worker. Each turn is a process of its own, which times the work alone:
of `prepare` all from the list of files to the published version, of `map` all from the texts in its table to the
tokens on disk.
"""

import argparse
import dataclasses
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from jaxinfra.bench.children import output
from jaxinfra.bench.table import Columns, Findings, Row, ratio, table
from jaxinfra.prepare.prepare import prepare
from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.sources.record import Found
from jaxinfra.prepare.sources.text import TextFiles
from jaxinfra.prepare.tokenizers import TokenizerFile, train_bpe

OURS, THEIRS = "prepare", "map"
TITLES = {OURS: "data prepare", THEIRS: "datasets.map"}
WORKERS = (1, 2)
TURNS = 5
VOCABULARY = 8192
COLUMNS: Columns = {
    "side": ("tokens by", str),
    "median_s": ("s", "{:.2f}".format),
    "mb_per_s": ("MB/s", "{:.2f}".format),
    "mtok_per_s": ("Mtok/s", "{:.2f}".format),
    "of_one_worker": ("of one worker", "{:.2f}".format),
    "of_datasets": ("of datasets.map", "{:.2f}".format),
}
GOALS = "Goals: two workers 1.6 times one, and at least as fast as datasets.map."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Side:
    """What is timed: who tokenises, with how many workers."""

    maker: str
    workers: int

    @property
    def title(self) -> str:
        """As in the table."""
        return f"{TITLES[self.maker]}, {self.workers} worker{'s' if self.workers > 1 else ''}"


def sides(chosen: Sequence[str] | None) -> list[Side]:
    """Those that are chosen, or ours and those of `datasets` where it is installed."""
    makers = chosen or [OURS, *([THEIRS] if importlib.util.find_spec("datasets") else [])]
    return [Side(maker=maker, workers=workers) for maker in makers for workers in WORKERS]


def texts(source: TextFiles) -> list[str]:
    """All texts of the files that can be read."""
    found = (each for piece in source.pieces(1 << 40) for each in source.read(piece))
    return [each.record["text"] for each in found if isinstance(each, Found)]


def ours(source: TextFiles, tokenizer: Path, workers: int, folder: Path) -> float:
    """Seconds that `prepare` takes."""
    recipe = Corpus(
        store=str(folder / "store"), source=source, tokenizer=TokenizerFile(path=str(tokenizer)), on_bad="skip"
    )
    start_s = time.perf_counter()
    prepare(recipe, workers=workers)
    return time.perf_counter() - start_s


def encode(tokenizer: Any, batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
    """What `map` applies to a batch."""
    return {"ids": [each.ids for each in tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False)]}


def theirs(source: TextFiles, tokenizer: Path, workers: int, folder: Path) -> float:
    """Seconds that `datasets.map` takes."""
    import datasets
    from tokenizers import Tokenizer

    datasets.disable_progress_bars()
    backend = Tokenizer.from_file(str(tokenizer))
    documents = datasets.Dataset.from_dict({"text": texts(source)})
    start_s = time.perf_counter()
    documents.map(
        partial(encode, backend),
        batched=True,
        num_proc=workers if workers > 1 else None,
        remove_columns=["text"],
        cache_file_name=str(folder / "tokens.arrow"),
    )
    return time.perf_counter() - start_s


def timed_s(side: Side, root: str, pattern: str, tokenizer: Path) -> float:
    """Seconds of one turn, in a process of its own."""
    words = (side.maker, str(side.workers), root, pattern, str(tokenizer))
    command = [sys.executable, "-m", "jaxinfra.bench.prepare", *words]
    environment = os.environ | {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return float(output(command, environment).split()[-1])


def run(options: argparse.Namespace) -> Findings:
    """Measures every side in turns."""
    source = TextFiles(root=options.text, pattern="**/*") if options.text else TextFiles()
    every = texts(source)
    n_bytes, turns = sum(len(text.encode()) for text in every), min(options.pairs, TURNS)
    times_s: dict[Side, list[float]] = {side: [] for side in sides(options.only)}
    with tempfile.TemporaryDirectory(prefix="jaxinfra-bench-") as name:
        path = Path(name) / "tokenizer.json"
        trained = train_bpe(every, vocab_size=VOCABULARY, end_of_document="<|endoftext|>")
        path.write_bytes(trained.content)
        tokens = sum(map(len, trained.encode_batch(every)))
        for turn in range(turns):
            for side in times_s:
                print(f"turn {turn + 1} of {turns}: {side.title} ...", file=sys.stderr, flush=True)
                times_s[side].append(timed_s(side, source.root, source.pattern, path))
    found = list(rows(times_s, n_bytes, tokens))
    note = f"{len(every):,} files, {n_bytes / 1e6:.1f} MB, {tokens:,} tokens; medians of {turns} turns"
    return Findings(text=f"{table(COLUMNS, found)}\n\n{GOALS}", note=note, figures={"rows": found})


def rows(times_s: dict[Side, list[float]], n_bytes: int, tokens: int) -> Iterator[Row]:
    """Yields the lines of the table; ratios are medians of those of the turns."""

    def ratio_to(other: Side, own: Side) -> float | None:
        return ratio(times_s[other], times_s[own]) if other in times_s and other != own else None

    for side, own in times_s.items():
        yield {
            "side": side.title,
            "median_s": median(own),
            "mb_per_s": n_bytes / 1e6 / median(own),
            "mtok_per_s": tokens / 1e6 / median(own),
            "of_one_worker": ratio_to(dataclasses.replace(side, workers=1), side),
            "of_datasets": ratio_to(dataclasses.replace(side, maker=THEIRS), side),
        }


def main(words: Sequence[str]) -> None:
    """Times one side and prints the seconds: maker, workers, root, pattern, tokenizer."""
    maker, workers, root, pattern, tokenizer = words
    with tempfile.TemporaryDirectory(prefix="jaxinfra-bench-") as folder:
        timed = ours if maker == OURS else theirs
        print(timed(TextFiles(root=root, pattern=pattern), Path(tokenizer), int(workers), Path(folder)))


if __name__ == "__main__":
    main(sys.argv[1:])
