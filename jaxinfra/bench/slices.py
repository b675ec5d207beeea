"""`python -m launch bench slices`: trains on two slices with a slow link between them, with and without mesh.replica.

Each slice is a process with two emulated CPU devices in a network namespace of its own (`slow_link`). With
`mesh.replica=2` only the gradients cross the link, once a step; with `mesh.fsdp=4` every gather of parameters does.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from jaxinfra.bench import merge_overrides
from jaxinfra.bench.slow_link import SlowLink
from jaxinfra.bench.subprocesses import BenchmarkProcessError, require_success
from jaxinfra.bench.table import BenchmarkResult, Cases, Columns, TableRow, run_cases
from jaxinfra.machine.emulation import emulation_env

WORKER = (sys.executable, "-m", "jaxinfra.bench.slice_worker")
SLICES, DEVICES = 2, 2  # slices, and devices of each
DELAY_S, BITS_PER_S = 0.025, 100e6  # in each direction, so 50 ms there and back
_LIMIT_S = 1800
MODEL = ("data.seq_len=128", "model.vocab_size=2048", "model.num_layers=2")  # 3 million parameters

COLUMNS: Columns = {
    "case": ("mesh", ""),
    "step_s": ("step", "{:.2f} s"),
    "sent_mb": ("a slice sends", "{:.2f} MB"),
    "expected_mb": ("expected", "{:.2f} MB"),
    "collectives": ("arrays that cross", "{:.0f}"),
}


def _row(options: argparse.Namespace, *mesh: str) -> TableRow:
    """Measures a mesh over both slices."""
    overrides = merge_overrides((*MODEL, *options.overrides, *mesh))
    env = {**os.environ, **emulation_env(DEVICES)}
    with SlowLink(delay_s=DELAY_S, bits_per_s=BITS_PER_S) as link:
        tasks = [json.dumps([index, SLICES, options.config, overrides, options.pairs]) for index in range(SLICES)]
        processes = [link.start([*WORKER, task], env) for task in tasks]
        with ThreadPoolExecutor(SLICES) as threads:  # a full pipe of one would hold up the other
            outputs = [*threads.map(_output, processes)]
    for process, task, (_, stderr) in zip(processes, tasks, outputs, strict=True):
        require_success([*WORKER, task], process.returncode, stderr)
    results = [json.loads(stdout.splitlines()[-1]) for stdout, _ in outputs]
    return {
        "case": " ".join(mesh),
        "step_s": max(result["step_s"] for result in results),
        "sent_mb": max(result["sent_bytes"] for result in results) / 1e6,
        "expected_mb": results[0]["expected_bytes"] / 1e6,
        "collectives": results[0]["collectives"],
        "loss": results[0]["loss"],
    }


def _output(process: subprocess.Popen[str]) -> tuple[str, str]:
    try:
        return process.communicate(timeout=_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise BenchmarkProcessError(f"a slice did not end within {_LIMIT_S} s; use fewer --pairs") from None


def replica(options: argparse.Namespace) -> Iterator[TableRow]:
    """Shards parameters inside each slice."""
    yield _row(options, f"mesh.replica={SLICES}", f"mesh.fsdp={DEVICES}")


def fsdp(options: argparse.Namespace) -> Iterator[TableRow]:
    """Shards parameters over both slices."""
    yield _row(options, f"mesh.fsdp={SLICES * DEVICES}")


CASES: Cases = {"replica": replica, "fsdp": fsdp}


def run(options: argparse.Namespace) -> BenchmarkResult:
    """Measures the cases that `--only` names, or all."""
    result = run_cases(options, CASES, COLUMNS)
    link = (
        f"two slices of {DEVICES} emulated devices, {1e3 * DELAY_S:.0f} ms and {BITS_PER_S / 1e6:.0f} Mbit/s each way"
    )
    return replace(result, note=f"{result.note} of a step; {link}")
