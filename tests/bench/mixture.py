"""`python -m launch bench mixture`: what a mixture of 40 sources takes in 8 processes, beside one source.

All processes open the stores as a training does, and read their rows of the same global batches. Both sides read as
many tokens, of stores with as many tokens in all. In every round each side starts its processes anew; the sides take
turns. Requests are those of all processes until the stores are open. The bucket is an emulator on this machine, so its
times are those of its Python.

`python -m tests.bench.mixture TASK` is one of the processes: it prints JSON.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import tensorstore as ts

from jaxinfra.data.batches import BatchLoader
from jaxinfra.data.mixture import MixSource, Mixture
from jaxinfra.launchers.local_processes import process_environments
from jaxinfra.prepare.tokenizers import Bytes, convert_tokenizer
from jaxinfra.processes.join import join
from jaxinfra.processes.peers import current_peers
from jaxinfra.processes.shared_reads import read_by_first
from jaxinfra.storage.objects import ObjectStore
from jaxinfra.track.memory import process_metrics
from tests.bench.commands import emulated_env, run_together
from tests.bench.data import write_store
from tests.bench.loader import SEQ_LEN, TokenFiles
from tests.bench.table import Cases, Columns, TableRow, median_ratio, time_rounds
from tests.servers.bucket import emulated_bucket

SOURCES, PROCESSES = 40, 8
GLOBAL_BATCH = 64
STORE_TOKENS = 2**16
BATCHES = {"disk": 400, "bucket": 40}  # that are timed
MAX_ROUNDS = 5

COLUMNS: Columns = {
    "case": ("stores on", ""),
    "sources": ("sources", "{:.0f}"),
    "threads": ("threads of a process", "{:.0f}"),
    "open_files": ("open files", "{:.0f}"),
    "memory_mb": ("memory MB", "{:.0f}"),
    "requests": ("requests at start", "{:.0f}"),
    "open_s": ("open s", "{:.2f}"),
    "batch_ms": ("ms a batch", "{:.2f}"),
    "ratio": ("ratio", "{:.2f}"),
}
NOTE = f"; {PROCESSES} processes, batches of {GLOBAL_BATCH} x {SEQ_LEN} tokens in all"


def read(stores: list[str], num_batches: int) -> dict[str, Any]:
    """Opens a mixture and reads batches, together with the other processes."""
    peers = current_peers()
    share = GLOBAL_BATCH // peers.count
    data = Mixture(sources=tuple(MixSource(store=store) for store in stores), seq_len=SEQ_LEN)
    before, before_requests, start_s = process_metrics(), num_requests(), time.perf_counter()
    with read_by_first(peers):
        opened = data.open()
    peers.gather(None)
    open_s = time.perf_counter() - start_s
    requests = num_requests() - before_requests
    batches = BatchLoader(
        data,
        opened.train,
        global_batch=GLOBAL_BATCH,
        rows=slice(share * peers.index, share * (peers.index + 1)),
        start_step=0,
        steps=2**40,
        sample_ids=opened.sample_ids,
    )
    with closing(iter(batches)) as steps:
        for _ in range(num_batches // 4):
            next(steps)
        peers.gather(None)
        start_s = time.perf_counter()
        for _ in range(num_batches):
            next(steps)
        batch_s = (time.perf_counter() - start_s) / num_batches
        after = process_metrics()
    return {
        "threads": after["threads"],
        "open_files": after["open_files"],
        "memory_mb": (after["rss_bytes"] - before["rss_bytes"]) / 1e6,
        "requests": requests,
        "open_s": open_s,
        "batch_ms": 1e3 * batch_s,
    }


def num_requests() -> int:
    """Returns how many requests to a bucket this process has made so far."""
    found = ts.experimental_collect_matching_metrics("/tensorstore/http/request_started")
    return sum(value["value"] for metric in found for value in metric["values"])


def write_stores(folder: Path) -> dict[str, list[Path]]:
    """Writes 40 stores, and one with as many tokens."""
    tokenizer, found = convert_tokenizer(Bytes())[0], dict[str, list[Path]]()
    for side, count in (("one", 1), ("mixture", SOURCES)):
        found[side] = []
        for number in range(count):
            files = TokenFiles(folder / side / str(number), STORE_TOKENS * SOURCES // count)
            files.store.mkdir(parents=True)
            write_store(files, tokenizer, np.random.default_rng(number))
            found[side].append(files.store)
    return found


def rows(options: argparse.Namespace, kind: str) -> Iterator[TableRow]:
    """Measures one source and 40 on a disk or in a bucket, in turns."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jaxinfra-bench-")))
        stores = {side: [*map(str, paths)] for side, paths in write_stores(folder).items()}
        environment: Mapping[str, str] = {}
        if kind == "bucket":
            bucket = stack.enter_context(emulated_bucket())
            environment = bucket.environment
            stack.enter_context(patch.dict(os.environ, environment))  # for the uploads
            for paths in stores.values():
                for number, path in enumerate(paths):
                    url = f"{bucket.url}{path}"
                    ObjectStore(url).upload(Path(path))
                    paths[number] = url

        def measure(side: str, number: int) -> dict[str, float]:
            task = json.dumps([stores[side], BATCHES[kind]])
            environments = [
                {**emulated_env(1), **environment, **each} for each in process_environments(PROCESSES, None)
            ]
            command = [sys.executable, "-m", "tests.bench.mixture", task]
            found = [json.loads(text.splitlines()[-1]) for text in run_together(command, environments)]
            return {name: (sum if name == "requests" else max)(each[name] for each in found) for name in found[0]}

        times = time_rounds({s: partial(measure, s) for s in stores}, min(options.pairs, MAX_ROUNDS), warmup=0)
    for side, found in times.items():
        row: dict[str, str | float | None] = {"case": kind, "sources": len(stores[side])}
        row |= {name: median(each[name] for each in found) for name in found[0]}
        if side == "mixture":
            row["ratio"] = median_ratio(*([each["batch_ms"] for each in times[s]] for s in ("mixture", "one")))
        yield row


CASES: Cases = {kind: partial(rows, kind=kind) for kind in BATCHES}


def main() -> None:
    """Reads in one of the processes what its only argument says in JSON."""
    stores, num_batches = json.loads(sys.argv[1])
    join()
    print(json.dumps(read(stores, num_batches)))
    current_peers().gather(None)


if __name__ == "__main__":
    main()
