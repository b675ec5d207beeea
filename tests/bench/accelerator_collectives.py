"""`bench accelerator --only collectives`: bytes a second of collective operations by the size of a mesh axis.

All groups of an axis communicate at once, as in a train step. Sizes are those of the larger of the operation's input
and output on a device. The bandwidth is that of a device's links, whatever the size of the axis ("bus bandwidth", as in
the tests of NCCL): an all-reduce of S bytes over n devices moves `2 (n - 1) / n S`, the others `(n - 1) / n S`.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxinfra.parallel.mesh import make_mesh
from jaxinfra.parallel.mesh_config import MeshConfig
from tests.bench.accelerator_timing import Case, NotMeasuredError, Part, Setting, unmeasured
from tests.bench.table import Columns, TableRow

COLUMNS: Columns = {
    "devices": ("devices", "{:.0f}"),
    "processes": ("processes", "{:.0f}"),
    "mib": ("MiB", "{:g}"),
    "us": ("time", "{:.1f} us"),
    "gb_per_s": ("bus bandwidth", "{:.2f} GB/s"),
    "right": ("right values", ""),
}
SIZES = (2**20, 2**24, 2**28)
SMALL_SIZES = (2**16, 2**20)
_SPLIT, _WHOLE = True, False


class Collective(NamedTuple):
    """A collective operation.

    Attributes:
        apply: computes it in a `shard_map`, given the shard and the axis.
        splits_input: whether the input is sharded over the axis; else each device has a copy.
        splits_output: whether the output is.
        copies: how many times the size of a shard of the input is the size of the operation, of n devices.
        moved: the bytes that a device sends for each byte of the size, of n devices.
        expected: the output, of the input and n.
    """

    apply: Callable[[jax.Array, str], jax.Array]
    splits_input: bool
    splits_output: bool
    copies: Callable[[int], int]
    moved: Callable[[int], float]
    expected: Callable[[np.ndarray, int], np.ndarray]


def _swap_chunks(x: np.ndarray, n: int) -> np.ndarray:
    return x.reshape(n, n, -1).swapaxes(0, 1).reshape(-1)


COLLECTIVES: dict[str, Collective] = {
    "all-gather": Collective(
        partial(jax.lax.all_gather, tiled=True), _SPLIT, _WHOLE, lambda n: n, lambda n: (n - 1) / n, lambda x, n: x
    ),
    "reduce-scatter": Collective(
        partial(jax.lax.psum_scatter, tiled=True),
        _WHOLE,
        _SPLIT,
        lambda n: 1,
        lambda n: (n - 1) / n,
        lambda x, n: n * x,
    ),
    "all-reduce": Collective(jax.lax.psum, _WHOLE, _WHOLE, lambda n: 1, lambda n: 2 * (n - 1) / n, lambda x, n: n * x),
    "all-to-all": Collective(
        partial(jax.lax.all_to_all, split_axis=0, concat_axis=0, tiled=True),
        _SPLIT,
        _SPLIT,
        lambda n: 1,
        lambda n: (n - 1) / n,
        _swap_chunks,
    ),
}


class Axis(NamedTuple):
    """A mesh axis to communicate over."""

    title: str
    mesh: Mesh
    name: str

    @property
    def size(self) -> int:
        """The devices of a group."""
        return self.mesh.shape[self.name]

    @property
    def processes(self) -> int:
        """The most processes that the devices of a group belong to."""
        groups = np.moveaxis(self.mesh.devices, self.mesh.axis_names.index(self.name), -1).reshape(-1, self.size)
        return max(len({device.process_index for device in group}) for group in groups)


def axes() -> Iterator[Axis]:
    """Yields an axis of all devices, one across the processes, and then the smaller ones."""
    devices: list[Any] = list(jax.devices())
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    per_slice = len(devices) // slices

    def axis(size: int) -> Axis:
        mesh = make_mesh(MeshConfig(replica=slices, fsdp=per_slice // size, tensor=size), devices)
        return Axis(f"tensor={size}", mesh, "tensor")

    sizes = [size for size in range(2, per_slice + 1) if per_slice % size == 0 and size & (size - 1) == 0]
    if per_slice > 1:
        yield axis(per_slice)
    if slices > 1:
        yield Axis(f"replica={slices}, across slices", axis(1).mesh, "replica")
    if (count := jax.process_count()) > 1:
        by_process = sorted(devices, key=lambda device: (device.process_index, device.id))
        grid = np.array(by_process, dtype=object).reshape(count, -1)
        yield Axis(f"across {count} processes", Mesh(grid, ("process", "local")), "process")
    for size in reversed(sizes):
        if size != per_slice:
            yield axis(size)


def measure(setting: Setting, axis: Axis, collective: Collective, size_bytes: int) -> TableRow:
    """Times an operation, and compares its values with those of NumPy on the smallest size."""
    n, itemsize = axis.size, 4
    mesh = Mesh(axis.mesh.devices, axis.mesh.axis_names, axis_types=(AxisType.Auto,) * axis.mesh.devices.ndim)
    split, whole = PartitionSpec(axis.name), PartitionSpec()
    in_spec, out_spec = (split if each else whole for each in (collective.splits_input, collective.splits_output))
    shard = size_bytes // itemsize // collective.copies(n) // (n * n) * (n * n)
    length = shard * n if collective.splits_input else shard
    if not length:
        raise NotMeasuredError(f"{size_bytes} bytes are too few for {n} devices")
    make = jax.jit(lambda: (jnp.arange(length) % 251).astype(jnp.float32), out_shardings=NamedSharding(mesh, in_spec))
    x = make()
    apply = jax.jit(
        jax.shard_map(
            lambda x: collective.apply(x, axis.name), mesh=mesh, in_specs=in_spec, out_specs=out_spec, check_vma=False
        )
    )
    right = None
    if size_bytes == min(*SIZES, *(SMALL_SIZES if setting.is_small else ())):
        expected = collective.expected((np.arange(length) % 251).astype(np.float32), n)
        shards = apply(x).addressable_shards
        right = "yes" if all(np.array_equal(each.data, expected[each.index]) for each in shards) else "NO"
    seconds = setting.seconds(lambda: apply(x))
    return {
        "devices": n,
        "processes": axis.processes,
        "mib": size_bytes / 2**20,
        "us": 1e6 * seconds,
        "gb_per_s": collective.moved(n) * size_bytes / seconds / 1e9,
        "right": right,
    }


def cases(setting: Setting) -> Iterator[Case]:
    """Yields each operation over each axis, with each size."""
    if len(jax.devices()) == 1:
        yield from unmeasured("collectives", "there is one device, so nothing to communicate with")
    for axis in axes():
        for name, collective in COLLECTIVES.items():
            for size in SMALL_SIZES if setting.is_small else SIZES:
                yield Case(f"{name}, {axis.title}", partial(measure, setting, axis, collective, size))


PART = Part(COLUMNS, 80, cases)
