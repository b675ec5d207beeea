"""`python -m launch bench checkpoint`: saves and restores a state with jaxinfra, plain Orbax, TensorStore and `write`.

In every round each side saves the same state, waits until it is on the disk, deletes its last one, and restores it; the
sides take turns in a random order. The files are in the page cache when they are restored. All sides share one process,
in which each has saved before.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from jaxinfra.checkpoint.config import CheckpointConfig
from jaxinfra.checkpoint.local_copies import LocalCopies
from jaxinfra.checkpoint.manager import CheckpointManager
from jaxinfra.checkpoint.shards import StateShards
from jaxinfra.machine.emulation import emulation_env
from jaxinfra.parallel.spec import leaves_by_name
from jaxinfra.processes.peers import Peers
from jaxinfra.storage.checks import check_space
from tests.bench.commands import call_in_process
from tests.bench.table import BenchmarkResult, Columns, TableRow, format_table, median_ratio, time_rounds

MAX_ROUNDS = 15
NUM_LEAVES = 30  # a third are parameters, the others moments of an optimizer

COLUMNS: Columns = {
    "side": ("saved by", ""),
    "blocked_ms": ("blocked ms", "{:.1f}"),
    "total_s": ("durable s", "{:.2f}"),
    "restore_s": ("restored s", "{:.2f}"),
    "gb": ("GB", "{:.3f}"),
    "blocked_vs_orbax": ("blocked vs. Orbax", "{:.2f}"),
    "total_vs_orbax": ("durable vs. Orbax", "{:.2f}"),
    "restore_vs_orbax": ("restored vs. Orbax", "{:.2f}"),
    "total_vs_raw": ("durable vs. write", "{:.2f}"),
    "restore_vs_raw": ("restored vs. read", "{:.2f}"),
}


class Side(NamedTuple):
    """How a state is saved into a folder, and restored.

    Attributes:
        save: starts to save after a step; returns when the state may be changed.
        restore: returns the arrays of the state after a step, as a tree.
        wait: waits until the state is on the disk, and the one before is deleted; `save` may have done so.
        close: ends threads, if there are any.
    """

    save: Callable[[int], object]
    restore: Callable[[int], Any]
    wait: Callable[[], object] = lambda: None
    close: Callable[[], object] = lambda: None


def jaxinfra_side(folder: Path, state: Any, *, compress: bool = False) -> Side:
    """`CheckpointManager` with hashes; a restore compares every byte with them."""
    manager = CheckpointManager(folder, CheckpointConfig(save_every=1, keep_last=1, compress=compress))
    return Side(
        save=lambda step: manager.save(step, state, {}),
        restore=lambda step: manager.restore(step, _abstract(state)),
        wait=manager.wait_until_finished,
        close=manager.close,
    )


def copy_side(folder: Path, state: Any) -> Side:
    """A copy as with `checkpoint.local`, which is not synced; a restore compares every byte with its hash."""
    shards = StateShards(_abstract(state), ["host"], 0)
    copies = LocalCopies(folder, "bench", shards, Peers(), lambda outgoing, sources: iter(()))

    def restore(step: int) -> Any:
        copy = copies.restore(step - 1, {}, lambda name: True)
        assert copy is not None
        return copy.state

    return Side(lambda step: copies.save(step, state, {}, {}), restore, wait=copies.wait_until_finished)


def orbax_side(folder: Path, state: Any) -> Side:
    """Orbax's manager with its defaults, which compress."""
    manager = ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=1))
    return Side(
        save=lambda step: manager.save(step, args=ocp.args.StandardSave(state)),
        restore=lambda step: manager.restore(step, args=ocp.args.StandardRestore(_abstract(state))),
        wait=manager.wait_until_finished,
        close=manager.close,
    )


def tensorstore_side(folder: Path, state: Any) -> Side:
    """A zarr array for each leaf, written and read at once, without compression; no manifest, no hashes."""

    def opened(step: int, name: str, **options: Any) -> Any:
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder / str(step) / name}/"}}
        return ts.open(spec, **options).result()

    def save(step: int) -> None:
        writes = []
        for name, leaf in leaves_by_name(state).items():
            values = np.asarray(leaf)
            array = opened(step, name, create=True, dtype=ts.dtype(values.dtype), shape=values.shape)
            writes.append(array.write(values))
        for write in writes:
            write.result()
        _delete_others(folder, step)

    def restore(step: int) -> Any:
        reads = {name: opened(step, name).read() for name in leaves_by_name(state)}
        return {name: read.result() for name, read in reads.items()}

    return Side(save, restore)


def raw_side(folder: Path, state: Any) -> Side:
    """The bytes in one file, by `write` and `fsync`, and by `readinto`: the floor."""

    def save(step: int) -> None:
        target = folder / str(step) / "state"
        target.parent.mkdir(parents=True)
        with target.open("wb", buffering=0) as file:
            for leaf in jax.tree.leaves(state):
                left = memoryview(np.asarray(leaf)).cast("B")
                while left:
                    left = left[file.write(left) :]
            os.fsync(file.fileno())
        _delete_others(folder, step)

    def restore(step: int) -> Any:
        arrays = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in leaves_by_name(state).items()}
        with (folder / str(step) / "state").open("rb", buffering=0) as file:
            for array in arrays.values():
                left = memoryview(array).cast("B")
                while left:
                    left = left[file.readinto(left) :]
        return arrays

    return Side(save, restore)


ORBAX, RAW = "plain Orbax, defaults", "write + fsync"
SIDES: Mapping[str, tuple[str, Callable[[Path, Any], Side]]] = {
    "jaxinfra": ("jaxinfra", jaxinfra_side),
    "compress": ("jaxinfra, checkpoint.compress", partial(jaxinfra_side, compress=True)),
    "copy": ("jaxinfra, checkpoint.local", copy_side),
    "orbax": (ORBAX, orbax_side),
    "tensorstore": ("TensorStore alone, zarr3", tensorstore_side),
    "raw": (RAW, raw_side),
}
"""Title and maker of each side, by the name that `--only` takes."""

type SideTimes = Mapping[str, Sequence[Mapping[str, float]]]
"""Of each side, for each round: seconds "blocked" by the save, in "total" until it is durable, and of the "restore"."""


def make_state(num_bytes: int) -> dict[str, Any]:
    """Returns normally distributed float32 parameters and moments, and the step."""
    width = max(1, round(num_bytes / NUM_LEAVES / 4 / 4096))
    draw = np.random.default_rng(0)

    def leaf() -> jax.Array:
        return jnp.asarray(draw.standard_normal((4, 1024, width), np.float32), copy=True)

    params, mu, nu = ({f"layer{number}": leaf() for number in range(NUM_LEAVES // 3)} for _ in range(3))
    return {"step": jnp.zeros((), jnp.int32), "params": params, "opt_state": {"mu": mu, "nu": nu}}


def time_sides(names: Sequence[str], root: Path, num_bytes: int, num_rounds: int) -> tuple[SideTimes, dict[str, int]]:
    """Times the sides in turn, after a first round as warm-up; also returns the bytes that each has written."""
    state = jax.block_until_ready(make_state(num_bytes))
    sides = dict[str, Side]()
    for name in names:
        (root / name).mkdir()
        sides[name] = SIDES[name][1](root / name, state)
    calls = {name: partial(_time_side, side, state) for name, side in sides.items()}
    times = time_rounds(calls, num_rounds, shuffled=True, shows=True)
    written_bytes = {name: _bytes_below(root / name) for name in names}
    for side in sides.values():
        side.close()
    return times, written_bytes


def make_rows(times: SideTimes, written_bytes: Mapping[str, int]) -> Iterable[TableRow]:
    """Yields the medians of each side, and the medians of the ratios of the rounds."""

    def seconds(name: str, column: str) -> list[float]:
        return [each[column] for each in times[name]]

    for name in times:
        row: dict[str, str | float | None] = {
            "side": SIDES[name][0],
            "blocked_ms": 1e3 * median(seconds(name, "blocked")),
            "total_s": median(seconds(name, "total")),
            "restore_s": median(seconds(name, "restore")),
            "gb": written_bytes[name] / 1e9,
        }
        for key in COLUMNS:
            column, is_ratio, other = key.partition("_vs_")  # as in "total_vs_raw"
            if is_ratio:
                has_other = other in times and other != name
                row[key] = median_ratio(seconds(name, column), seconds(other, column)) if has_other else None
        yield row


def run(options: argparse.Namespace) -> BenchmarkResult:
    """Times the sides that `--only` names, or all."""
    num_bytes, num_rounds = options.megabytes * 10**6, min(options.pairs, MAX_ROUNDS)
    names = [name for name in SIDES if options.only is None or name in options.only]
    with tempfile.TemporaryDirectory(prefix="jaxinfra-bench-") as folder:
        # Each side has its last state while it writes the next.
        needed = (len(names) + 1) * num_bytes
        check_space(folder, needed, purpose="the bench", fix="set TMPDIR to a folder on another disk")
        times, written_bytes = call_in_process(time_sides, emulation_env(1), names, Path(folder), num_bytes, num_rounds)
    rows = list(make_rows(times, written_bytes))
    text = format_table(COLUMNS, rows)
    if "raw" in times:
        speeds = [num_bytes / 1e9 / median(each[column] for each in times["raw"]) for column in ("total", "restore")]
        text += f"\n\nFloors: the disk takes {speeds[0]:.2f} GB/s and the page cache gives {speeds[1]:.2f} GB/s."
    return BenchmarkResult(
        text=text,
        note=f"{options.megabytes:,} MB in {NUM_LEAVES} float32 arrays; medians of {num_rounds} rounds",
        measurements={"rows": rows, "megabytes": options.megabytes, "rounds": num_rounds},
    )


def _time_side(side: Side, state: Any, step: int) -> dict[str, float]:
    """Saves and restores once, and checks that what is restored has the same bits."""
    os.sync()  # not while the disk is busy with what the side before has left
    start_s = time.perf_counter()
    side.save(step)
    blocked_s = time.perf_counter() - start_s
    side.wait()
    total_s = time.perf_counter() - start_s
    start_s = time.perf_counter()
    restored = jax.block_until_ready(side.restore(step))
    restore_s = time.perf_counter() - start_s
    found = leaves_by_name(restored)
    for name, leaf in leaves_by_name(state).items():
        assert np.array_equal(found[name], leaf), name
    return {"blocked": blocked_s, "total": total_s, "restore": restore_s}


def _abstract(state: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def _delete_others(folder: Path, step: int) -> None:
    for path in folder.iterdir():
        if path.name != str(step):
            shutil.rmtree(path)


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
