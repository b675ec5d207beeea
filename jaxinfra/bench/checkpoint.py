"""`python -m launch bench checkpoint`: saves and restores a state with jaxinfra, plain Orbax, TensorStore and `write`.

In every round each side saves the same state, waits until it is on the disk, deletes its last one, and restores it; the
sides take turns in a random order. The files are in the page cache when they are restored. All sides share one process,
in which each has saved before.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, override

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from jaxinfra.bench.subprocesses import call_in_process
from jaxinfra.bench.table import BenchmarkResult, Columns, TableRow, format_table, median_ratio
from jaxinfra.checkpoint.config import CheckpointConfig
from jaxinfra.checkpoint.leaves import leaves_by_name
from jaxinfra.checkpoint.local_copies import LocalCopies
from jaxinfra.checkpoint.manager import CheckpointManager
from jaxinfra.checkpoint.shards import StateShards
from jaxinfra.errors import ConfigError
from jaxinfra.machine.emulation import emulation_env
from jaxinfra.processes.peers import Peers
from jaxinfra.storage.checks import check_space

DEFAULT_MB, MIN_MB = 1000, 1
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


class Side(ABC):
    """Saves a state into a folder, and restores it."""

    def __init__(self, folder: Path, state: Any) -> None:
        self.folder, self.state = folder, state

    @abstractmethod
    def save(self, step: int) -> None:
        """Starts to save; returns when the state may be changed."""

    def wait(self) -> None:
        """Waits until the state is on the disk, and the one before is deleted; `save` may have done so."""
        return

    @abstractmethod
    def restore(self, step: int) -> Any:
        """Returns the arrays of the state, as a tree."""

    def close(self) -> None:
        """Ends threads, if there are any."""
        return


class JaxinfraSide(Side):
    """`CheckpointManager` with hashes; a restore compares every byte with them."""

    compress = False

    def __init__(self, folder: Path, state: Any) -> None:
        super().__init__(folder, state)
        config = CheckpointConfig(save_every=1, keep_last=1, compress=self.compress)
        self._manager = CheckpointManager(folder, config)

    @override
    def save(self, step: int) -> None:
        self._manager.save(step, self.state, {})

    @override
    def wait(self) -> None:
        self._manager.wait_until_finished()

    @override
    def restore(self, step: int) -> Any:
        return self._manager.restore(step, _abstract(self.state))

    @override
    def close(self) -> None:
        self._manager.close()


class CompressedSide(JaxinfraSide):
    """The same with `checkpoint.compress`."""

    compress = True


class CopySide(Side):
    """A copy as with `checkpoint.local`, which is not synced; a restore compares every byte with its hash."""

    def __init__(self, folder: Path, state: Any) -> None:
        super().__init__(folder, state)
        shards = StateShards(_abstract(state), ["host"], 0)
        self._copies = LocalCopies(folder, "bench", shards, Peers(), lambda outgoing, sources: iter(()))

    @override
    def save(self, step: int) -> None:
        self._copies.save(step, self.state, {}, {})

    @override
    def wait(self) -> None:
        self._copies.wait_until_finished()

    @override
    def restore(self, step: int) -> Any:
        copy = self._copies.restore(step - 1, {}, lambda name: True)
        assert copy is not None
        return copy.state


class OrbaxSide(Side):
    """Orbax's manager with its defaults, which compress."""

    def __init__(self, folder: Path, state: Any) -> None:
        super().__init__(folder, state)
        self._manager = ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=1))

    @override
    def save(self, step: int) -> None:
        self._manager.save(step, args=ocp.args.StandardSave(self.state))

    @override
    def wait(self) -> None:
        self._manager.wait_until_finished()

    @override
    def restore(self, step: int) -> Any:
        return self._manager.restore(step, args=ocp.args.StandardRestore(_abstract(self.state)))

    @override
    def close(self) -> None:
        self._manager.close()


class TensorStoreSide(Side):
    """A zarr array for each leaf, written and read at once, without compression; no manifest, no hashes."""

    @override
    def save(self, step: int) -> None:
        writes = []
        for name, leaf in leaves_by_name(self.state).items():
            values = np.asarray(leaf)
            spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{self.folder / str(step) / name}/"}}
            array = ts.open(spec, create=True, dtype=ts.dtype(values.dtype), shape=values.shape).result()
            writes.append(array.write(values))
        for write in writes:
            write.result()
        _delete_others(self.folder, step)

    @override
    def restore(self, step: int) -> Any:
        reads = {}
        for name in leaves_by_name(self.state):
            spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{self.folder / str(step) / name}/"}}
            reads[name] = ts.open(spec).result().read()
        return {name: read.result() for name, read in reads.items()}


class RawSide(Side):
    """The bytes in one file, by `write` and `fsync`, and by `readinto`: the floor."""

    @override
    def save(self, step: int) -> None:
        target = self.folder / str(step) / "state"
        target.parent.mkdir(parents=True)
        with target.open("wb", buffering=0) as file:
            for leaf in jax.tree.leaves(self.state):
                left = memoryview(np.asarray(leaf)).cast("B")
                while left:
                    left = left[file.write(left) :]
            os.fsync(file.fileno())
        _delete_others(self.folder, step)

    @override
    def restore(self, step: int) -> Any:
        arrays = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in leaves_by_name(self.state).items()}
        with (self.folder / str(step) / "state").open("rb", buffering=0) as file:
            for array in arrays.values():
                left = memoryview(array).cast("B")
                while left:
                    left = left[file.readinto(left) :]
        return arrays


ORBAX, RAW = "plain Orbax, defaults", "write + fsync"
SIDES: Mapping[str, tuple[str, type[Side]]] = {
    "jaxinfra": ("jaxinfra", JaxinfraSide),
    "compress": ("jaxinfra, checkpoint.compress", CompressedSide),
    "copy": ("jaxinfra, checkpoint.local", CopySide),
    "orbax": (ORBAX, OrbaxSide),
    "tensorstore": ("TensorStore alone, zarr3", TensorStoreSide),
    "raw": (RAW, RawSide),
}
"""Title and class of each side, by the name that `--only` takes."""


@dataclass
class SideTimes:
    """Seconds of each round of a side, and the bytes that it has written."""

    blocked_s: list[float] = field(default_factory=list)
    total_s: list[float] = field(default_factory=list)
    restore_s: list[float] = field(default_factory=list)
    num_bytes: int = 0


def make_state(num_bytes: int) -> dict[str, Any]:
    """Returns normally distributed float32 parameters and moments, and the step."""
    width = max(1, round(num_bytes / NUM_LEAVES / 4 / 4096))
    draw = np.random.default_rng(0)

    def leaf(number: int) -> jax.Array:
        return jnp.asarray(draw.standard_normal((4, 1024, width), np.float32), copy=True)

    groups = [{f"layer{number}": leaf(number) for number in range(NUM_LEAVES // 3)} for _ in range(3)]
    return {
        "step": jnp.zeros((), jnp.int32),
        "params": groups[0],
        "opt_state": {"mu": groups[1], "nu": groups[2]},
    }


def time_sides(names: Sequence[str], root: Path, num_bytes: int, num_rounds: int) -> dict[str, SideTimes]:
    """Times the sides in turn; a first round is warm-up, and checks that what is restored has the same bits."""
    state = jax.block_until_ready(make_state(num_bytes))
    sides = {name: _make_side(name, root / name, state) for name in names}
    times = {name: SideTimes() for name in names}
    for round_number in range(num_rounds + 1):
        # In another order each time, and not while the disk is busy with what the side before has left.
        for name in random.Random(round_number).sample(names, len(names)):
            side = sides[name]
            os.sync()
            restored = _time_side(side, round_number, times[name])
            if round_number == 0:
                _check_same(name, restored, state)
                times[name] = SideTimes(num_bytes=_bytes_below(side.folder))
            del restored
        print(f"round {round_number} of {num_rounds}", file=sys.stderr, flush=True)
    for side in sides.values():
        side.close()
    return times


def make_rows(times: Mapping[str, SideTimes]) -> Iterable[TableRow]:
    """Yields the medians of each side, and the medians of the ratios of the rounds."""
    orbax, raw = times.get("orbax"), times.get("raw")

    def ratio(get: Callable[[SideTimes], list[float]], each: SideTimes, other: SideTimes | None) -> float | None:
        return None if other is None or other is each else median_ratio(get(each), get(other))

    for name, each in times.items():
        yield {
            "side": SIDES[name][0],
            "blocked_ms": 1e3 * median(each.blocked_s),
            "total_s": median(each.total_s),
            "restore_s": median(each.restore_s),
            "gb": each.num_bytes / 1e9,
            "blocked_vs_orbax": ratio(lambda side: side.blocked_s, each, orbax),
            "total_vs_orbax": ratio(lambda side: side.total_s, each, orbax),
            "restore_vs_orbax": ratio(lambda side: side.restore_s, each, orbax),
            "total_vs_raw": ratio(lambda side: side.total_s, each, raw),
            "restore_vs_raw": ratio(lambda side: side.restore_s, each, raw),
        }


def run(options: argparse.Namespace) -> BenchmarkResult:
    """Times the sides that `--only` names, or all."""
    megabytes = DEFAULT_MB if options.megabytes is None else options.megabytes
    if megabytes < MIN_MB:
        raise ConfigError(f"--megabytes {megabytes}: must be {MIN_MB} or more; use --megabytes {MIN_MB}")
    num_bytes, num_rounds = megabytes * 10**6, min(options.pairs, MAX_ROUNDS)
    names = [name for name in SIDES if options.only is None or name in options.only]
    with tempfile.TemporaryDirectory(prefix="jaxinfra-bench-") as folder:
        # Each side has its last state while it writes the next.
        needed = (len(names) + 1) * num_bytes
        check_space(folder, needed, purpose="the bench", fix="set TMPDIR to a folder on another disk")
        times = call_in_process(time_sides, emulation_env(1), names, Path(folder), num_bytes, num_rounds)
        rows = list(make_rows(times))
    text = format_table(COLUMNS, rows)
    if "raw" in times:
        floor = times["raw"]
        speeds = [num_bytes / 1e9 / median(each) for each in (floor.total_s, floor.restore_s)]
        text += f"\n\nFloors: the disk takes {speeds[0]:.2f} GB/s and the page cache gives {speeds[1]:.2f} GB/s."
    return BenchmarkResult(
        text=text,
        note=f"{megabytes:,} MB in {NUM_LEAVES} float32 arrays; medians of {num_rounds} rounds",
        measurements={"rows": rows, "megabytes": megabytes, "rounds": num_rounds},
    )


def _make_side(name: str, folder: Path, state: Any) -> Side:
    folder.mkdir()
    return SIDES[name][1](folder, state)


def _time_side(side: Side, step: int, times: SideTimes) -> Any:
    """Saves and restores once; returns what was restored."""
    start_s = time.perf_counter()
    side.save(step)
    times.blocked_s.append(time.perf_counter() - start_s)
    side.wait()
    times.total_s.append(time.perf_counter() - start_s)
    start_s = time.perf_counter()
    restored = jax.block_until_ready(side.restore(step))
    times.restore_s.append(time.perf_counter() - start_s)
    return restored


def _check_same(name: str, restored: Any, state: Any) -> None:
    found = leaves_by_name(restored)
    for leaf_name, leaf in leaves_by_name(state).items():
        assert np.array_equal(found[leaf_name], leaf), f"{name}: {leaf_name}"


def _abstract(state: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def _delete_others(folder: Path, step: int) -> None:
    for path in folder.iterdir():
        if path.name != str(step):
            shutil.rmtree(path)


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
