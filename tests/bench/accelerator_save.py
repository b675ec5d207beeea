"""`bench accelerator --only save`: saves and restores a state that is sharded over all devices, as a run does."""

import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxinfra.checkpoint.config import CheckpointConfig
from jaxinfra.checkpoint.manager import CheckpointManager
from jaxinfra.processes.peers import current_peers
from jaxinfra.storage.checks import check_space
from jaxinfra.storage.location import is_remote
from jaxinfra.storage.objects import ObjectStore
from tests.bench.accelerator_timing import Case, NotMeasuredError, Part, Setting
from tests.bench.table import Columns, TableRow

COLUMNS: Columns = {
    "gb": ("GB", "{:.2f}"),
    "blocked_ms": ("blocked", "{:.1f} ms"),
    "save_gb_per_s": ("saved", "{:.2f} GB/s"),
    "restore_gb_per_s": ("restored", "{:.2f} GB/s"),
    "equal": ("same bits", ""),
}
STATE_BYTES, SMALL_STATE_BYTES = 2**31, 2**25
NUM_LEAVES = 16
SAVES = 3


def _make_state(num_bytes: int) -> Mapping[str, Any]:
    """Returns float32 arrays that are sharded over all devices."""
    devices = jax.devices()
    mesh = Mesh(devices, ("fsdp",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    rows = max(1, round(num_bytes / NUM_LEAVES / 4 / 1024 / len(devices))) * len(devices)
    names = [f"layer{number}" for number in range(NUM_LEAVES)]

    @partial(jax.jit, out_shardings=dict.fromkeys(names, sharding))
    def make() -> dict[str, jax.Array]:
        keys = jax.random.split(jax.random.key(0), NUM_LEAVES)
        return {name: jax.random.normal(key, (rows, 1024)) for name, key in zip(names, keys, strict=True)}

    return {"params": make()}


@contextmanager
def _folder(setting: Setting) -> Iterator[str]:
    """Makes a new folder for all processes, which is deleted at the end; a temporary one needs a common host."""
    peers = current_peers()
    name = f"jaxinfra-bench-{time.time_ns()}"
    if setting.folder is None and len(set(peers.hosts)) > 1:
        raise NotMeasuredError("the hosts share no temporary folder; use --folder with a bucket or a shared disk")
    folder = str(peers.broadcast(f"{(setting.folder or tempfile.gettempdir()).rstrip('/')}/{name}"))
    try:
        yield folder
    finally:
        peers.gather(None)  # all have read
        if peers.index == 0 and is_remote(folder):
            parent, _, name = folder.rpartition("/")
            ObjectStore(parent).delete_below(name)
        elif peers.index == 0:
            shutil.rmtree(folder, ignore_errors=True)


def save_row(setting: Setting) -> TableRow:
    """Saves and restores a state with hashes, as a run does; the median of three times."""
    num_bytes = SMALL_STATE_BYTES if setting.is_small else STATE_BYTES
    check_space(setting.folder or tempfile.gettempdir(), 3 * num_bytes, purpose="the bench", fix="use --folder DIR")
    state = jax.block_until_ready(_make_state(num_bytes))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    equal = jax.jit(lambda a, b: jnp.all(jnp.stack([jnp.all(x == y) for x, y in zip(a, b, strict=True)])))
    blocked_s, saved_s, restored_s, are_equal = list[float](), list[float](), list[float](), True
    peers = current_peers()
    with (
        _folder(setting) as folder,
        CheckpointManager(
            folder, CheckpointConfig(save_every=1, keep_last=1), gather=lambda value: peers.gather(value, "checkpoint")
        ) as manager,
    ):
        for number in range(1, 1 + SAVES):
            start_s = time.perf_counter()
            manager.save(number, state, {})
            blocked_s.append(time.perf_counter() - start_s)
            manager.wait_until_finished()
            saved_s.append(time.perf_counter() - start_s)
            start_s = time.perf_counter()
            restored = jax.block_until_ready(manager.restore(number, abstract))
            restored_s.append(time.perf_counter() - start_s)
            are_equal = are_equal and bool(equal(jax.tree.leaves(state), jax.tree.leaves(restored)))
    gb = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e9
    return {
        "gb": gb,
        "blocked_ms": 1e3 * median(blocked_s),
        "save_gb_per_s": gb / median(saved_s),
        "restore_gb_per_s": gb / median(restored_s),
        "equal": "yes" if are_equal else "NO",
    }


def cases(setting: Setting) -> Iterator[Case]:
    """Yields the one case."""
    place = "a temporary folder" if setting.folder is None else "a bucket" if is_remote(setting.folder) else "--folder"
    yield Case(f"checkpoint in {place}", partial(save_row, setting))


PART = Part(COLUMNS, 50, cases)
