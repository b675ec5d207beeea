"""`python -m launch bench hub`: reads and writes the weights of a model, against reading and writing the same bytes.

The weights are random, in bfloat16, in the format of Hugging Face. Before each round their files leave the page cache.
The first round measures what the process holds in memory besides the arrays.
"""

import argparse
import filecmp
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfra.data.tokens import TokenData
from jaxinfra.hub.export import Export, export_model, family_of
from jaxinfra.hub.params import load_published
from jaxinfra.hub.published_model import open_published, param_shapes
from jaxinfra.inference.sampling_program import sampling_program
from jaxinfra.interop.config_json import CONFIG
from jaxinfra.interop.safetensors import INDEX
from jaxinfra.interop.writing import PlannedFile, plan_files
from jaxinfra.machine.emulation import emulation_env
from jaxinfra.models.attention import Attention
from jaxinfra.models.layers import MLP
from jaxinfra.models.transformer import Layer, TransformerConfig
from jaxinfra.ops.rope import Rope
from jaxinfra.run import Precision, Run
from jaxinfra.storage.checks import check_space
from jaxinfra.track.memory import rss_bytes
from tests.bench.commands import Times, call_in_process
from tests.bench.table import BenchmarkResult, Columns, TableRow, format_table, median_ratio, time_rounds

MAX_ROUNDS = 5
NUM_LAYERS, VOCAB_SIZE, HEAD_DIM = 16, 4096, 64
PARTS = ("read", "write")
DTYPE = jnp.dtype(jnp.bfloat16)
_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
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
    target, linear = megabytes * 1e6 / DTYPE.itemsize, 2.0 * VOCAB_SIZE
    quadratic = NUM_LAYERS * (4.0 + 3 * 4)  # matrices of attention and MLP, as squares of the width
    width = ((linear**2 + 4 * quadratic * target) ** 0.5 - linear) / (2 * quadratic)
    heads = max(1, round(width / HEAD_DIM))
    return TransformerConfig(
        vocab_size=VOCAB_SIZE,
        num_layers=NUM_LAYERS,
        hidden_size=heads * HEAD_DIM,
        layers=(
            Layer(
                mixer=Attention(num_heads=heads, head_dim=HEAD_DIM, rope=Rope(theta=10000.0)),
                mlp=MLP(dim=4 * heads * HEAD_DIM),
            ),
        ),
    )


def planned_files(model: TransformerConfig) -> list[PlannedFile]:
    """Returns the files of its weights, as an export divides them."""
    shapes = param_shapes(model)
    return plan_files(family_of(model)[0].bindings(model, shapes), dict.fromkeys(shapes, DTYPE))


def write_random(folder: Path, model: TransformerConfig) -> None:
    """Writes a model with random weights into a new folder."""
    family, keys = family_of(model)
    files = planned_files(model)
    block = np.random.default_rng(0).standard_normal(_BLOCK_BYTES // DTYPE.itemsize, np.float32).astype(DTYPE).tobytes()
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps({"model_type": family.model_type} | keys))
    if len(files) > 1:
        weight_map = {tensor: file.name for file in files for tensor in file.offsets}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for file in files:
        with (folder / file.name).open("wb") as weights:
            weights.write(file.header)
            while left := file.nbytes - weights.tell():
                weights.write(block[:left])


def time_sides(root: Path, num_rounds: int, parts: Collection[str]) -> tuple[Times, dict[str, int]]:
    """Times reading, writing or both in turn with raw files; also returns the bytes in memory besides the arrays.

    A first round is warm-up, and measures memory. Each round checks that what was read is written with the same bytes.
    """
    source, copy, raw, block = root / "source", root / "copy", root / "raw", os.urandom(_BLOCK_BYTES)
    files = sorted(source.glob("*.safetensors"))
    model = open_published(f"hf:{source}").config
    precision = Precision(params="bfloat16", compute="bfloat16")
    run = Run(name="bench", model=model, data=TokenData(store="none", seq_len=1), precision=precision)
    program, start_bytes = sampling_program(run, jax.devices()), rss_bytes()
    memory = dict[str, int]()

    def read() -> Any:
        params, _ = load_published(f"hf:{source}", model, program.params)
        return jax.block_until_ready(params)

    def note_memory(side: str, params: Any, peak_bytes: int | None) -> None:
        if peak_bytes is not None:
            held_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
            memory.setdefault(side, peak_bytes - start_bytes - held_bytes)

    def time_read(number: int) -> float:
        forget(files)
        with program.on_mesh:
            params, seconds, peak_bytes = measured(read)
        note_memory("read", params, peak_bytes)
        return seconds

    def time_raw_read(number: int) -> float:
        forget(files)
        return measured(partial(read_raw, files))[1]

    def time_write(number: int) -> float:
        with program.on_mesh:
            params = read()
            export = Export(config=model, params=params, source={}, tokenizer=None, max_positions=1)
            _, seconds, peak_bytes = measured(partial(export_model, str(copy), export))
        note_memory("write", params, peak_bytes)
        _, *others = filecmp.cmpfiles(source, copy, [file.name for file in files], shallow=False)
        assert others == [[], []], "what was read is not what was written"
        shutil.rmtree(copy)
        return seconds

    def time_raw_write(number: int) -> float:
        seconds = measured(partial(write_raw, files, raw, block))[1]
        raw.unlink()
        return seconds

    sides = {"read": time_read, "raw-read": time_raw_read, "write": time_write, "raw-write": time_raw_write}
    asked = {side: time_side for side, time_side in sides.items() if side.removeprefix("raw-") in parts}
    return time_rounds(asked, num_rounds, shows=True), memory


def read_raw(files: Sequence[Path]) -> None:
    """Reads files in blocks, as `dd` does."""
    block = bytearray(_BLOCK_BYTES)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass


def write_raw(sources: Sequence[Path], target: Path, block: bytes) -> None:
    """Writes as many bytes as `sources` have, the same block again and again, and syncs them."""
    left = sum(source.stat().st_size for source in sources)
    with target.open("wb", buffering=0) as file:
        while left:
            left -= file.write(block[:left])
        os.fsync(file.fileno())


def forget(files: Sequence[Path]) -> None:
    """Drops files from the page cache, where the system can."""
    if sys.platform == "linux":
        for path in files:
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def knows_peak() -> bool:
    """Whether the system tells the largest resident memory between two moments: Linux, outside of some sandboxes."""
    return os.access(_CLEAR_REFS, os.W_OK)


def measured[R](action: Callable[[], R]) -> tuple[R, float, int | None]:
    """Returns a result, its seconds, and the largest resident memory meanwhile in bytes, None where it is not known."""
    if knows_peak():
        _CLEAR_REFS.write_text("5")  # lets VmHWM begin at what is resident now
    start_s = time.perf_counter()
    result = action()
    seconds = time.perf_counter() - start_s
    if not knows_peak():
        return result, seconds, None
    (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return result, seconds, int(line.split()[1]) * 1024


def make_rows(times: Times, memory: Mapping[str, int], file_bytes: int, largest_bytes: int) -> Iterable[TableRow]:
    """Yields the medians of each side, and those of the ratios of the rounds."""
    for side, seconds in times.items():
        row: dict[str, str | float | None] = {
            "side": SIDES[side],
            "seconds": median(seconds),
            "gb_per_s": file_bytes / 1e9 / median(seconds),
        }
        if f"raw-{side}" in times:
            row["speed_vs_raw"] = median_ratio(times[f"raw-{side}"], seconds)
        if side in memory:
            row["memory_mb"] = memory[side] / 1e6
            row["memory_limit_mb"] = 2 * largest_bytes / 1e6 + 300  # the goal of docs/performance.md
        yield row


def run(options: argparse.Namespace) -> BenchmarkResult:
    """Times reading and writing on one device."""
    num_rounds = min(options.pairs, MAX_ROUNDS)
    model = model_of(options.megabytes)
    largest = max(np.prod(shape, dtype=int) for shape in param_shapes(model).values()) * DTYPE.itemsize
    file_bytes = sum(file.nbytes for file in planned_files(model))
    with tempfile.TemporaryDirectory(prefix="jaxinfra-bench-") as folder:
        check_space(folder, 2 * file_bytes, purpose="the bench", fix="set TMPDIR to a folder on another disk")
        write_random(Path(folder) / "source", model)
        parts = options.only or PARTS
        times, memory = call_in_process(time_sides, emulation_env(1), Path(folder), num_rounds, parts)
    rows = [*make_rows(times, memory, file_bytes, int(largest))]
    return BenchmarkResult(
        text=format_table(COLUMNS, rows),
        note=f"{file_bytes / 1e6:,.0f} MB, the largest parameter has {largest / 1e6:,.0f} MB; medians of {num_rounds} "
        "rounds",
        measurements={"rows": rows, "megabytes": options.megabytes, "rounds": num_rounds},
    )
