"""`python -m launch bench hub`: reads and writes the weights of a model, against reading and writing the same bytes.

The weights are random, in bfloat16, in the format of Hugging Face, and larger than what a process may hold of them
besides its arrays. Before each round the files leave the page cache.
"""

import argparse
import filecmp
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfra.bench.subprocesses import Times, call_in_process
from jaxinfra.bench.table import BenchmarkResult, Columns, TableRow, format_table, median_ratio
from jaxinfra.data.tokens import TokenData
from jaxinfra.errors import ConfigError
from jaxinfra.hub import export_model, family_of, load_published, open_published, param_shapes
from jaxinfra.interop.config_json import CONFIG
from jaxinfra.interop.safetensors import WEIGHTS
from jaxinfra.interop.writing import plan_files
from jaxinfra.models.attention import Attention
from jaxinfra.models.layers import MLP
from jaxinfra.models.transformer import Layer, TransformerConfig
from jaxinfra.ops.rope import Rope
from jaxinfra.run import Precision, Run
from jaxinfra.runtime.emulation import emulation_env
from jaxinfra.sampling_program import sampling_program
from jaxinfra.storage.checks import check_space
from jaxinfra.track.memory import rss_bytes

DEFAULT_MB, MIN_MB = 1000, 10
MAX_ROUNDS = 5
NUM_LAYERS, VOCAB_SIZE, HEAD_DIM = 16, 4096, 64
PARTS = ("read", "write")
DTYPE = jnp.dtype(jnp.bfloat16)
_BLOCK_BYTES = 16 * 2**20  # that are read or written at once, as by `dd bs=16M`

COLUMNS: Columns = {
    "side": ("", ""),
    "seconds": ("seconds", "{:.2f}"),
    "gb_per_s": ("GB/s", "{:.2f}"),
    "speed_vs_raw": ("speed vs. raw", "{:.2f}"),
    "memory_mb": ("MB in memory besides the arrays", "{:,.0f}"),
    "memory_limit_mb": ("goal", "<= {:,.0f}"),
}
SIDES = {
    "read": "jaxinfra, init=hf:",
    "raw-read": "raw read",
    "write": "jaxinfra, hub export",
    "raw-write": "write + fsync",
}


def model_of(megabytes: int) -> TransformerConfig:
    """Returns a Llama whose weights have about this size in bfloat16."""
    per_layer = 2.5 + 3 * 4  # matrices of attention and MLP, as squares of the width
    target, linear = megabytes * 1e6 / DTYPE.itemsize, 2.0 * VOCAB_SIZE
    quadratic = NUM_LAYERS * per_layer
    width = ((linear**2 + 4 * quadratic * target) ** 0.5 - linear) / (2 * quadratic)
    heads = max(4, round(width / HEAD_DIM / 4) * 4)
    mixer = Attention(num_heads=heads, num_kv_heads=heads // 4, rope=Rope(theta=10000.0))
    return TransformerConfig(
        vocab_size=VOCAB_SIZE,
        num_layers=NUM_LAYERS,
        hidden_size=heads * HEAD_DIM,
        layers=(Layer(mixer=mixer, mlp=MLP(dim=4 * heads * HEAD_DIM)),),
    )


def write_random(folder: Path, model: TransformerConfig) -> None:
    """Writes a model with random weights into a new folder, in one file."""
    family, keys = family_of(model)
    shapes = param_shapes(model)
    bindings = family.bindings(model, shapes)
    (file,) = plan_files(bindings, dict.fromkeys(shapes, DTYPE), max_bytes=sys.maxsize)
    block = np.random.default_rng(0).standard_normal(_BLOCK_BYTES // DTYPE.itemsize, np.float32).astype(DTYPE).tobytes()
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps({"model_type": family.model_type} | keys))
    with (folder / WEIGHTS).open("wb") as weights:
        weights.write(file.header)
        while left := file.nbytes - weights.tell():
            weights.write(block[:left])


def time_sides(root: Path, num_rounds: int, parts: Collection[str]) -> tuple[Times, dict[str, int]]:
    """Times reading, writing or both in turn with raw files; also returns the bytes in memory besides the arrays.

    A first round is warm-up, measures memory, and checks that what was read is written with the same bytes.
    """
    source, copy, raw = root / "source", root / "copy", root / "raw"
    model = open_published(f"hf:{source}").config
    precision = Precision(params="bfloat16", compute="bfloat16")
    run = Run(name="bench", model=model, data=TokenData(store="none", seq_len=1), precision=precision)
    program, start_bytes = sampling_program(run, jax.devices()), rss_bytes()

    def read() -> Any:
        params, _ = load_published(f"hf:{source}", model, program.params)
        return jax.block_until_ready(params)

    def write(params: Any) -> None:
        export_model(str(copy), model, params, source={}, tokenizer=None, max_positions=1)

    def beyond_arrays(arrays: Any) -> int:
        return peak_bytes() - start_bytes - sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))

    times: Times = {side: [] for part in parts for side in (part, f"raw-{part}")}
    memory = dict[str, int]()
    for round_number in range(num_rounds + 1):
        if "read" in parts:
            forget(source / WEIGHTS)
            times["raw-read"].append(_seconds(lambda: read_raw(source / WEIGHTS))[0])
            forget(source / WEIGHTS)
        reset_peak()
        with program.on_mesh:
            seconds, params = _seconds(read)
            memory.setdefault("read", beyond_arrays(params))
            if "read" in parts:
                times["read"].append(seconds)
            if "write" in parts:
                reset_peak()
                times["write"].append(_seconds(partial(write, params))[0])
                memory.setdefault("write", beyond_arrays(params))
        del params
        if "write" in parts:
            same = filecmp.cmp(source / WEIGHTS, copy / WEIGHTS, shallow=False)
            assert same, "what was read is not what was written"
            shutil.rmtree(copy)
            times["raw-write"].append(_seconds(lambda: write_raw(source / WEIGHTS, raw))[0])
            raw.unlink()
        print(f"round {round_number} of {num_rounds}", file=sys.stderr, flush=True)
    return {side: seconds[1:] for side, seconds in times.items()}, memory


def read_raw(path: Path) -> None:
    """Reads a file in blocks, as `dd` does."""
    block = bytearray(_BLOCK_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(block):
            pass


def write_raw(source: Path, target: Path) -> None:
    """Writes as many bytes as `source` has, in blocks, and syncs them."""
    block, left = os.urandom(_BLOCK_BYTES), source.stat().st_size
    with target.open("wb", buffering=0) as file:
        while left:
            left -= file.write(block[:left])
        os.fsync(file.fileno())


def forget(path: Path) -> None:
    """Drops a file from the page cache, where the system can."""
    if sys.platform == "linux":
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def reset_peak() -> None:
    """Lets `peak_bytes` begin at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Returns the largest resident memory of this process since `reset_peak`."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def make_rows(times: Times, memory: Mapping[str, int], file_bytes: int, largest_bytes: int) -> Iterable[TableRow]:
    """Yields the medians of each side, and those of the ratios of the rounds."""
    for side, seconds in times.items():
        row: dict[str, str | float | None] = {
            "side": SIDES[side],
            "seconds": median(seconds),
            "gb_per_s": file_bytes / 1e9 / median(seconds),
        }
        if side in memory:
            row["speed_vs_raw"] = median_ratio(times[f"raw-{side}"], seconds)
            row["memory_mb"] = memory[side] / 1e6
            row["memory_limit_mb"] = 2 * largest_bytes / 1e6 + 300
        yield row


def run(options: argparse.Namespace) -> BenchmarkResult:
    """Times reading and writing on one device."""
    megabytes = DEFAULT_MB if options.megabytes is None else options.megabytes
    if megabytes < MIN_MB:
        raise ConfigError(f"--megabytes {megabytes}: must be {MIN_MB} or more; use --megabytes {MIN_MB}")
    num_rounds = min(options.pairs, MAX_ROUNDS)
    model = model_of(megabytes)
    largest = max(np.prod(shape, dtype=int) for shape in param_shapes(model).values()) * DTYPE.itemsize
    with tempfile.TemporaryDirectory(prefix="jaxinfra-bench-") as folder:
        check_space(folder, 3 * megabytes * 10**6, purpose="the bench", fix="set TMPDIR to a folder on another disk")
        write_random(Path(folder) / "source", model)
        file_bytes = (Path(folder) / "source" / WEIGHTS).stat().st_size
        parts = options.only or PARTS
        times, memory = call_in_process(time_sides, emulation_env(1), Path(folder), num_rounds, parts)
    rows = [*make_rows(times, memory, file_bytes, int(largest))]
    return BenchmarkResult(
        text=format_table(COLUMNS, rows),
        note=f"{file_bytes / 1e6:,.0f} MB, the largest parameter has {largest / 1e6:,.0f} MB; medians of {num_rounds} "
        "rounds",
        measurements={"rows": rows, "megabytes": megabytes, "rounds": num_rounds},
    )


def _seconds[R](action: Callable[[], R]) -> tuple[float, R]:
    start_s = time.perf_counter()
    result = action()
    return time.perf_counter() - start_s, result
