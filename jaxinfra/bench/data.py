"""`python -m launch bench data`: batches of random windows, by this project's loader and by others.

All read the same tokens from a warm file cache, in turns; each turn starts its loader anew, waits for its first
batches, and counts those of half a second and the CPU time of all threads and processes that made them.
"""

import argparse
import dataclasses
import gc
import importlib
import importlib.util
import resource
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import tensorstore as ts

from jaxinfra.bench import reading, token_files
from jaxinfra.bench.reading import BATCH, LENGTH, Request, Stores
from jaxinfra.bench.table import Findings, machine, table
from jaxinfra.config import load
from jaxinfra.data.store import arrays
from jaxinfra.errors import ConfigError
from jaxinfra.run import Run, of_text
from jaxinfra.runtime.peak import CHIP_FLOPS

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

type Reader = Callable[[Stores], Iterator[Any]]


def gather(stores: Stores) -> Iterator[np.ndarray]:
    """Copies windows out of a mapped file: what memory allows."""
    windows, rng = stores.memmap(), np.random.default_rng(0)
    while True:
        yield windows[rng.integers(0, stores.windows, BATCH) * LENGTH]


def tensorstore(stores: Stores) -> Iterator[np.ndarray]:
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
    """What a loader did in one turn.

    Attributes:
        tokens_per_s: after its first batches.
        cpu_ns: CPU time of all its threads and processes a token, its start included.
    """

    tokens_per_s: float
    cpu_ns: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table of speeds.

    Attributes:
        reader: what reads.
        tokens_per_s: median of the turns.
        cpu_ns: median CPU time a token.
        cores: that would be busy with feeding `CHIPS` chips that train `MODEL`.
        of_alone: speed as a part of that of TensorStore alone, the median of the turns.
        of_grain: and of Grain's, where it is installed.
    """

    reader: str
    tokens_per_s: float
    cpu_ns: float
    cores: float
    of_alone: float
    of_grain: float | None


def cpu_s() -> float:
    """CPU seconds of this process, and of those that it has waited for."""
    used = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def turn(reader: Reader, stores: Stores, seconds: float) -> Turn:
    """Starts a loader, reads for so long, and ends it."""
    gc.collect()
    start_cpu_s = cpu_s()
    batches = reader(stores)
    for _ in range(WARM_UPS):
        next(batches)
    start_s, count = time.perf_counter(), 0
    while (spent_s := time.perf_counter() - start_s) < seconds or not count:
        next(batches)
        count += 1
    close = getattr(batches, "close", None)
    if close is not None:
        close()
    tokens = BATCH * LENGTH
    return Turn(
        tokens_per_s=count * tokens / spent_s,
        cpu_ns=1e9 * (cpu_s() - start_cpu_s) / ((count + WARM_UPS) * tokens),
    )


def eaten_tokens_per_s() -> float:
    """Tokens a second of `CHIPS` chips that train `MODEL`, by its FLOPs and the chip's data sheet."""
    model, data = of_text(load(MODEL, root=Run).run)
    return CHIPS * CHIP_FLOPS[CHIP] * MFU * data.seq_len / model.flops(data)


def speed(stores: Stores, turns: int) -> list[Row]:
    """All loaders in turns; the first turn of each is dropped."""
    sides = readers()
    found: dict[str, list[Turn]] = {name: [] for name in sides}
    for number in range(turns + 1):
        for name, reader in sides.items():
            one = turn(reader, stores, TURN_S)
            if number:
                found[name].append(one)
    eaten = eaten_tokens_per_s()

    def ratio(name: str, other: str) -> float:
        return median(a.tokens_per_s / b.tokens_per_s for a, b in zip(found[name], found[other], strict=True))

    rows = []
    for name, all_turns in found.items():
        cpu_ns = median(one.cpu_ns for one in all_turns)
        rows.append(
            Row(
                reader=name,
                tokens_per_s=median(one.tokens_per_s for one in all_turns),
                cpu_ns=cpu_ns,
                cores=1e-9 * cpu_ns * eaten,
                of_alone=ratio(name, ALONE),
                of_grain=ratio(name, GRAIN) if GRAIN in found else None,
            )
        )
    return rows


def first_s(stores: Stores, turns: int) -> list[float]:
    """Seconds from the start of a process, imports and all, to its first batch."""
    request = Request(kind="first", folder=str(stores.folder), tokens=stores.tokens)
    return [reading.ask(request) for _ in range(turns + 1)][1:]


def growth_bytes(stores: Stores, batches: int) -> int:
    """How much larger a process of its own has become after so many batches, documents masked."""
    return int(reading.ask(Request(kind="growth", folder=str(stores.folder), tokens=stores.tokens, batches=batches)))


def _speed_lines(rows: Sequence[Row]) -> Iterator[str]:
    cells: list[Sequence[str]] = [
        ("batches by", "Mtok/s", "CPU ns a token", f"cores for {CHIPS} {CHIP}", "of TensorStore alone", "of Grain")
    ]
    for row in rows:
        speeds = f"{row.tokens_per_s / 1e6:.1f}", f"{row.cpu_ns:.1f}", f"{row.cores:.4f}"
        of_grain = "" if row.of_grain is None else f"{row.of_grain:.1f}"
        cells.append((row.reader, *speeds, f"{row.of_alone:.2f}", of_grain))
    yield table(cells)


def run(options: argparse.Namespace) -> Findings:
    """Measures the chosen parts, or all.

    Raises:
        ConfigError: too few tokens are asked for.
    """
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
                rows = speed(stores, turns)
                figures["rows"] = [dataclasses.asdict(row) for row in rows]
                lines += _speed_lines(rows)
            elif part == "first":
                figures["first_batch_s"] = median(first_s(stores, turns))
                lines.append(
                    f"First batch {figures['first_batch_s']:.2f} s after the start of a process, "
                    "which imports all that it needs, and no jax (goal < 1 s)."
                )
            else:
                figures["growth_bytes"] = growth_bytes(stores, GROWTH_BATCHES)
                grown = f"{figures['growth_bytes'] / MB:.1f} MB larger (goal < 50)"
                lines.append(f"{GROWTH_BATCHES:,} batches make the process {grown}.")
    sizes = f"{tokens:,} tokens, windows of {LENGTH:,}, batches of {BATCH}"
    note = f"{sizes}; medians of {turns} turns"
    return Findings(text="\n".join(lines), note=note, figures=figures, facts=machine())
