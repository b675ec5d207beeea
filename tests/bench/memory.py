"""`python -m launch bench memory`: the host memory of a save and of a restore, in 1, 2 and 4 processes.

Each process has one CPU device, on which the state is sharded in full, and saves as a training does: in the background,
while train steps donate the state to the next one. So the shard is there twice until it is written, as on accelerators
the copy on the host is there besides what the process had. A restore begins without a state. What is counted is the
highest resident memory during the call minus that before it.

`python -m tests.bench.memory TASK` is one of the processes: it saves or restores once, and prints JSON.
"""

import argparse
import ctypes
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfra.checkpoint.config import CheckpointConfig
from jaxinfra.checkpoint.manager import CheckpointManager
from jaxinfra.launchers.local_processes import process_environments
from jaxinfra.machine.emulation import emulation_env
from jaxinfra.machine.host_memory import keep_freed_memory
from jaxinfra.processes.join import join
from jaxinfra.processes.peers import current_peers
from jaxinfra.storage.checks import check_space
from jaxinfra.track.memory import rss_bytes
from tests.bench.commands import emulated_env, run_together
from tests.bench.table import BenchmarkResult, Cases, Columns, TableRow, format_table
from tests.servers.bucket import emulated_bucket

COUNTS = (1, 2, 4)  # processes
FACTOR, FIXED_BYTES = 1.2, 300e6  # the goal: this share of the shard, and these bytes
STEPS_WHILE_SAVING = 3
# Shares of a state: the three large weights of a stacked model, its smaller ones and those of the embedding.
LEAVES = (0.23, 0.23, 0.23, 0.1, 0.1, 0.04, 0.03, 0.02, 0.02)

COLUMNS: Columns = {
    "case": ("to", ""),
    "processes": ("processes", "{:.0f}"),
    "call": ("", ""),
    "shard_mb": ("shard MB", "{:,.0f}"),
    "peak_mb": ("peak MB", "{:,.0f}"),
    "ratio": ("of the shard", "{:.2f}"),
    "goal_mb": ("goal: at most", "{:,.0f}"),
    "seconds": ("seconds", "{:.1f}"),
}


def abstract_state(num_bytes: int) -> dict[str, Any]:
    """Returns float32 parameters and moments as of a stacked model, sharded over all devices."""
    mesh = jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(jax.sharding.AxisType.Explicit,))
    sharding = jax.NamedSharding(mesh, jax.P(None, "fsdp"))

    def leaves() -> dict[str, jax.ShapeDtypeStruct]:
        shapes = [(32, 8, max(1, round(share * num_bytes / 3 / 4 / 256))) for share in LEAVES]
        return {
            f"w{number}": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
            for number, shape in enumerate(shapes)
        }

    return {"params": leaves(), "opt_state": {"mu": leaves(), "nu": leaves()}}


def save(place: str, num_bytes: int) -> dict[str, Any]:
    """Saves a state while train steps go on."""
    abstract = abstract_state(num_bytes)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    @partial(jax.jit, out_shardings=shardings)
    def init() -> Any:
        numbers = itertools.count()

        def leaf_values(leaf: jax.ShapeDtypeStruct) -> jax.Array:
            columns = jax.lax.broadcasted_iota(leaf.dtype, leaf.shape, leaf.ndim - 1, out_sharding=leaf.sharding)
            return columns + next(numbers)

        return jax.tree.map(leaf_values, abstract)

    @partial(jax.jit, donate_argnums=0)
    def train(state: Any) -> Any:
        return jax.tree.map(lambda leaf: 0.999 * leaf, state)

    state = jax.block_until_ready(train(init()))
    found = checksums(state)
    with _manager(place) as checkpoints, measured() as result:
        checkpoints.save(1, state, {})
        for _ in range(STEPS_WHILE_SAVING):
            state = jax.block_until_ready(train(state))
        checkpoints.wait_until_finished()
    shard_bytes = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    return {**result, "shard_bytes": shard_bytes, "checksums": found}


def restore(place: str, num_bytes: int) -> dict[str, Any]:
    """Restores the state that `save` has saved."""
    abstract = abstract_state(num_bytes)
    with _manager(place) as checkpoints, measured() as result:
        state = jax.block_until_ready(checkpoints.restore(1, abstract))
    shard_bytes = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    return {**result, "shard_bytes": shard_bytes, "checksums": checksums(state)}


@jax.jit
def _checksum(leaf: jax.Array) -> jax.Array:
    return jnp.sum(jax.lax.bitcast_convert_type(leaf, jnp.uint32))


def checksums(state: Any) -> list[int]:
    """Returns the sum of the bits of each array."""
    current_peers().gather(None)  # the first collective waits 30 s for the other processes
    return [int(_checksum(leaf)) for leaf in jax.tree.leaves(state)]


def _manager(place: str) -> CheckpointManager:
    peers = current_peers()
    config = CheckpointConfig(save_every=1, keep_last=1)
    return CheckpointManager(place, config, gather=lambda value: peers.gather(value, "checkpoint", 600.0))


@contextmanager
def measured() -> Iterator[dict[str, float]]:
    """Fills the result with the seconds of the block, and its highest resident memory minus that before it."""
    result, status = dict[str, float](), Path("/proc/self/status")
    ctypes.CDLL(None).malloc_trim(0)  # what is free would hide as much of what the block takes
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest one so far (proc(5))
    before, start_s = rss_bytes(), time.perf_counter()
    yield result
    result["seconds"] = time.perf_counter() - start_s
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    result["peak_bytes"] = int(fields["VmHWM"].split()[0]) * 1024 - before


def rows(options: argparse.Namespace, kind: str) -> Iterator[TableRow]:
    """Measures saves and restores of a disk or a bucket."""
    num_bytes = options.megabytes * 10**6
    with ExitStack() as stack:
        place, environment = stack.enter_context(tempfile.TemporaryDirectory(prefix="jaxinfra-bench-")), {}
        if kind == "bucket":
            bucket = stack.enter_context(emulated_bucket())
            place, environment = bucket.url, bucket.environment
        else:
            check_space(
                place, len(COUNTS) * num_bytes, purpose="the bench", fix="set TMPDIR to a folder on another disk"
            )
        for count in COUNTS:
            yield from rows_of(f"{place}/{count}", kind, count, num_bytes, environment)


def rows_of(place: str, kind: str, count: int, num_bytes: int, environment: Mapping[str, str]) -> Iterator[TableRow]:
    """Measures one save and one restore in a number of processes."""
    saved: list[int] = []
    for call in CALLS:
        task = json.dumps([call, place, num_bytes])
        shares = process_environments(count, None) if count > 1 else [emulation_env(1)]
        results = run_together(
            [sys.executable, "-m", "tests.bench.memory", task],
            [{**emulated_env(1), **environment, **share} for share in shares],
        )
        found = [json.loads(result.splitlines()[-1]) for result in results]
        saved = saved or found[0]["checksums"]
        assert all(each["checksums"] == saved for each in found), "restores what was saved"
        peak, shard = max(each["peak_bytes"] for each in found), found[0]["shard_bytes"]
        yield {
            "case": kind,
            "processes": count,
            "call": call,
            "shard_mb": shard / 1e6,
            "peak_mb": peak / 1e6,
            "ratio": peak / shard,
            "goal_mb": (FACTOR * shard + FIXED_BYTES) / 1e6,
            "seconds": max(each["seconds"] for each in found),
        }


CALLS = {"save": save, "restore": restore}
CASES: Cases = {kind: partial(rows, kind=kind) for kind in ("disk", "bucket")}


def run(options: argparse.Namespace) -> BenchmarkResult:
    """Measures the places that `--only` names, or both."""
    found = [row for kind in options.only or CASES for row in CASES[kind](options)]
    return BenchmarkResult(
        text=format_table(COLUMNS, found),
        note=f"{options.megabytes:,} MB in {3 * len(LEAVES)} float32 arrays; one call each, the most of the processes",
        measurements={"rows": found, "megabytes": options.megabytes},
    )


def main() -> None:
    """Saves or restores in one of the processes, as its only argument says in JSON."""
    keep_freed_memory()  # as a run on one CPU device does
    call, place, num_bytes = json.loads(sys.argv[1])
    join()
    print(json.dumps(CALLS[call](place, num_bytes)))
    current_peers().gather(None)


if __name__ == "__main__":
    main()
