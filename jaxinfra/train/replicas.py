"""Compares what several devices hold a copy of, to find a device that computes wrong.

Each device sums the bits of its own shards, and only the sums leave the devices. Shards that one device alone holds,
such as those of fully sharded parameters without `mesh.replica`, cannot be compared.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxinfra.errors import CorruptionError
from jaxinfra.parallel.bits import UNSIGNED, sum_bits
from jaxinfra.parallel.spec import PyTree, leaf_name


class ReplicaCheck:
    """Compares the copies of a state's shards on a mesh, but for those in host memory.

    `state` is the train state as `ShapeDtypeStruct`s.

    Attributes:
        leaves: the parts of the state that are compared, with their names.
    """

    def __init__(self, mesh: Mesh, state: PyTree) -> None:
        self._mesh = mesh
        paths = [(leaf_name(path), leaf) for path, leaf in jax.tree.leaves_with_path(state)]
        self._compared = [index for index, (_, leaf) in enumerate(paths) if _is_on_device(leaf)]
        self.leaves = [paths[index] for index in self._compared]

    @property
    def fraction(self) -> float:
        """The part of the compared bytes of which several devices hold a copy."""
        copied = [leaf.size * leaf.dtype.itemsize * _has_copies(leaf) for _, leaf in self.leaves]
        return sum(copied) / max(1, sum(leaf.size * leaf.dtype.itemsize for _, leaf in self.leaves))

    def check(self, step: int, state: PyTree) -> None:
        """Raises CorruptionError, in all processes, if copies differ; it names the devices. Waits for the devices."""
        sums = self.sums(state)
        devices = self._mesh.devices.reshape(-1)
        column = {device: index for index, device in enumerate(devices)}
        for (name, leaf), row in zip(self.leaves, sums, strict=True):
            groups: dict[str, list[Any]] = defaultdict(list)  # part of the array -> devices that hold a copy of it
            for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
                groups[str(index)].append(device)
            for copies in groups.values():
                if suspects := minority({device: int(row[column[device]]) for device in copies}):
                    processes = {each.process_index for each in suspects}
                    raise CorruptionError(_message(step, name, suspects, len(copies)), processes)

    def sums(self, state: PyTree) -> np.ndarray:
        """Returns the sums of the bits of each device's shards: uint32[leaves, devices]. Waits for the devices."""
        leaves = jax.tree.leaves(state)
        with jax.set_mesh(self._mesh):
            return np.asarray(jax.device_get(self._sums([leaves[index] for index in self._compared])))

    @cached_property
    def _sums(self) -> Any:
        """The compiled function `sums(leaves) -> uint32[leaves, devices]`; every device has the result."""
        axes = self._mesh.axis_names

        def of_device(*leaves: jax.Array) -> jax.Array:
            return jnp.stack([sum_bits(leaf) for leaf in leaves])[:, None]

        def sums(leaves: Sequence[jax.Array]) -> jax.Array:
            specs = tuple(leaf.sharding.spec for _, leaf in self.leaves)
            by_device = jax.shard_map(of_device, in_specs=specs, out_specs=PartitionSpec(None, axes), check_vma=False)
            return jax.reshard(by_device(*leaves), NamedSharding(self._mesh, PartitionSpec()))

        return jax.jit(sums)


def _is_on_device(leaf: jax.ShapeDtypeStruct) -> bool:
    """Whether a part of the state is in device memory, and of a type whose bits can be summed."""
    kind = leaf.sharding.memory_kind if leaf.sharding is not None else None
    return leaf.dtype.itemsize in UNSIGNED and kind not in ("pinned_host", "unpinned_host")


def _has_copies(leaf: jax.ShapeDtypeStruct) -> bool:
    """Whether several devices hold the same part of an array."""
    parts = leaf.sharding.devices_indices_map(leaf.shape).values()
    return len({str(part) for part in parts}) < len(parts)


def minority(sums: dict[Any, int]) -> list[Any]:
    """Returns the devices whose sum is not that of most; all devices if there is no majority."""
    counts = Counter(sums.values()).most_common()
    if len(counts) == 1:
        return []
    has_majority = counts[0][1] > len(sums) / 2
    return [device for device, each in sums.items() if not has_majority or each != counts[0][0]]


def _message(step: int, name: str, suspects: Sequence[Any], copies: int) -> str:
    devices = " or ".join(f"device {each.id} of process {each.process_index}" for each in suspects)
    return f"step {step}: {devices}: holds other bits of {name} than the rest of its {copies} copies"
