"""`python -m launch bench data`: batches of random windows, by this project's loader and by others.

All read the same tokens from a warm file cache, in turns; each turn starts its loader anew, waits for its first
batches, and counts those of half a second and the CPU time of all threads and processes that made them.
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
from typing import Any

import numpy as np
import tensorstore as ts

from jaxinfra.bench import reading, token_files
from jaxinfra.bench.reading import BATCH, LENGTH, Stores
from jaxinfra.bench.table import Columns, Findings, Row, ratio, table
from jaxinfra.config import load
from jaxinfra.data.store import arrays
from jaxinfra.errors import ConfigError
from jaxinfra.run import Run, of_text
from jaxinfra.runtime.peak_flops import PEAK_FLOPS

TOKENS, LEAST_TOKENS = 200_000_000, 4 * BATCH * LENGTH
TURN_S = 0.5
WARM_UPS = 8
"""Batches of a turn before its time counts."""
TURNS = 15
CHIPS, CHIP, MFU, MODEL = 64, "TPU v5p", 0.4, "configs/llama3_8b.py"
GROWTH_BATCHES = 10_000
MB = 1_000_000

IN_FLIGHT = 4
"""Reads that the loop over TensorStore alone has started before it waits for the first."""

type Stream[T] = Generator[T, None, None]
type Reader = Callable[[Stores], Stream[Any]]


def gather(stores: Stores) -> Stream[np.ndarray]:
    """Copies windows out of a mapped file: what memory allows."""
    windows, rng = stores.memmap(), np.random.default_rng(0)
    while True:
        yield windows[rng.integers(0, stores.windows, BATCH) * LENGTH]


def tensorstore(stores: Stores) -> Stream[np.ndarray]:
    """TensorStore alone: one read a batch, several of them in flight."""
    array, rng = arrays.open_array(stores.array, arrays.cache_context()), np.random.default_rng(0)
    asked: deque[ts.Future[np.ndarray]] = deque()
    while True:
        starts = (rng.integers(0, stores.windows, BATCH) * LENGTH).tolist()
        with ts.Batch() as together:
            windows = [array[start : start + LENGTH + 1] for start in starts]
            asked.append(ts.concat(windows, axis=0).read(batch=together))
        if len(asked) > IN_FLIGHT:
            yield asked.popleft().result().reshape(BATCH, LENGTH + 1)


ALONE, OURS, GRAIN = "TensorStore alone", "jaxinfra", "Grain MapDataset, ArrayRecord"


def readers() -> dict[str, Reader]:
    """Ours, and those of others that are installed."""
    found: dict[str, Reader] = {
        "memmap, gathered": gather,
        ALONE: tensorstore,
        OURS: partial(reading.jaxinfra, mask_documents=False),
        f"{OURS}, documents masked": reading.jaxinfra,
        f"{OURS}, whole documents packed": partial(reading.jaxinfra, packing="best_fit"),
    }
    if installed("grain"):
        others = importlib.import_module("jaxinfra.bench.other_readers")
        found |= {GRAIN: others.grain_dataset, "Grain DataLoader, ArrayRecord": others.grain_loader}
        if installed("torch"):
            found |= {f"PyTorch DataLoader, memmap, {n} workers": partial(others.torch, workers=n) for n in (0, 1, 2)}
    return found


def installed(package: str) -> bool:
    """Whether it can be imported."""
    return importlib.util.find_spec(package) is not None


COLUMNS: Columns = {
    "reader": ("batches by", str),
    "tokens_per_s": ("Mtok/s", lambda speed: f"{speed / 1e6:.1f}"),
    "cpu_ns": ("CPU ns a token", "{:.1f}".format),  # of all threads and processes, the start included
    "cores": (f"cores for {CHIPS} {CHIP}", "{:.4f}".format),  # busy with feeding chips that train `MODEL`
    "of_alone": ("of TensorStore alone", "{:.2f}".format),
    "of_grain": ("of Grain", "{:.1f}".format),  # where it is installed
}
"""Medians of the turns."""


def cpu_s() -> float:
    """CPU seconds of this process, and of those that it has waited for."""
    used = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def turn(reader: Reader, stores: Stores, seconds: float) -> tuple[float, float]:
    """Starts a loader, reads for so long, and ends it; returns tokens a second, and CPU nanoseconds a token."""
    gc.collect()
    start_cpu_s = cpu_s()
    with closing(reader(stores)) as batches:
        for _ in range(WARM_UPS):
            next(batches)
        start_s, count = time.perf_counter(), 0
        while (spent_s := time.perf_counter() - start_s) < seconds or not count:
            next(batches)
            count += 1
    tokens = BATCH * LENGTH
    return count * tokens / spent_s, 1e9 * (cpu_s() - start_cpu_s) / ((count + WARM_UPS) * tokens)


def eaten_tokens_per_s() -> float:
    """Tokens a second of `CHIPS` chips that train `MODEL`, by its FLOPs and the chip's data sheet."""
    model, data = of_text(load(MODEL, root=Run).run)
    return CHIPS * PEAK_FLOPS[CHIP] * MFU * data.seq_len / model.flops(data)


def speed(stores: Stores, turns: int) -> Iterator[Row]:
    """Times all loaders in turns; the first turn of each is dropped."""
    sides = readers()
    rounds = [{name: turn(reader, stores, TURN_S) for name, reader in sides.items()} for _ in range(turns + 1)][1:]
    speeds = {name: [found[name][0] for found in rounds] for name in sides}
    eaten = eaten_tokens_per_s()
    for name, own in speeds.items():
        cpu_ns = median(found[name][1] for found in rounds)
        yield {
            "reader": name,
            "tokens_per_s": median(own),
            "cpu_ns": cpu_ns,
            "cores": 1e-9 * cpu_ns * eaten,
            "of_alone": ratio(own, speeds[ALONE]),
            "of_grain": ratio(own, speeds[GRAIN]) if GRAIN in speeds else None,
        }


def run(options: argparse.Namespace) -> Findings:
    """Measures the chosen parts, or all."""
    tokens, turns = TOKENS if options.tokens is None else options.tokens, min(options.pairs, TURNS)
    if tokens < LEAST_TOKENS:
        raise ConfigError(f"--tokens {tokens}: expected {LEAST_TOKENS} or more, for batches of different windows")
    figures: dict[str, Any] = {"tokens": tokens, "turns": turns}
    lines: list[str] = []
    with tempfile.TemporaryDirectory(prefix="jaxinfra-bench-") as name:
        print(f"writing {tokens:,} tokens ...", file=sys.stderr, flush=True)
        stores = token_files.build(Path(name), tokens, records=installed("grain"))
        for part in options.only or ("speed", "first", "memory"):
            print(f"measuring {part} ...", file=sys.stderr, flush=True)
            if part == "speed":
                figures["rows"] = list(speed(stores, turns))
                lines.append(table(COLUMNS, figures["rows"]))
            elif part == "first":
                times_s = [reading.ask("first", stores) for _ in range(turns + 1)]
                figures["first_batch_s"] = median(times_s[1:])
                lines.append(
                    f"First batch {figures['first_batch_s']:.2f} s after the start of a process, "
                    "which imports all that it needs, and no jax (goal < 1 s)."
                )
            else:
                figures["growth_bytes"] = int(reading.ask("growth", stores, GROWTH_BATCHES))
                grown = f"{figures['growth_bytes'] / MB:.1f} MB larger (goal < 50)"
                lines.append(f"{GROWTH_BATCHES:,} batches make the process {grown}.")
    sizes = f"{tokens:,} tokens, windows of {LENGTH:,}, batches of {BATCH}"
    return Findings(text="\n".join(lines), note=f"{sizes}; medians of {turns} turns", figures=figures)
