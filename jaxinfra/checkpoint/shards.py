"""The shards of a state: which process holds each, which are on one host only, and who keeps a copy of those.

A shard is known by its number: all processes number the shards of all arrays in the same order. A shard that several
hosts hold, as with replicas, needs no copy on another one.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np
import xxhash

from jaxinfra.checkpoint.leaves import leaf_types, place

type Bounds = tuple[tuple[int, int], ...]
"""First and last index, plus one, of a shard in each dimension of its array."""

type Place = tuple[int, Bounds]
"""The number of an array, and the part of it that a shard is."""


class Shard(NamedTuple):
    """A part of an array, and the devices that hold it."""

    leaf: int
    bounds: Bounds
    dtype: np.dtype
    devices: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the part."""
        return tuple(stop - start for start, stop in self.bounds)

    @property
    def num_bytes(self) -> int:
        """Bytes of the part."""
        return math.prod(self.shape) * self.dtype.itemsize


class StateShards[State]:
    """The shards of a state, as a process sees them.

    Attributes:
        own: numbers of the shards on devices of this process.
        neighbor: the process that keeps copies for this one.
        sent: numbers of the shards that it keeps for this process.
        received: numbers of the shards that this process keeps for others, by their index.
        exchanges: whether any process keeps shards for another.
        leaf_types: the type of each array by name.
        layout: a hash of types and shards; equal numbers mean equal shards only where it is equal.

    Args:
        abstract_state: the state as `jax.ShapeDtypeStruct`s with shardings.
        hosts: the host of each process.
        index: of this process.
    """

    def __init__(self, abstract_state: State, hosts: Sequence[str], index: int) -> None:
        self._abstract_state, self._index = abstract_state, index
        self._shards = [shard for leaf in enumerate(jax.tree.leaves(abstract_state)) for shard in _shards_of(*leaf)]
        self._numbers = {(shard.leaf, shard.bounds): number for number, shard in enumerate(self._shards)}
        groups = groups_by_host(hosts)
        sent: dict[int, list[int]] = {process: [] for process in range(len(hosts))}
        for number, shard in enumerate(self._shards):
            holders = {device.process_index for device in shard.devices}
            if len(groups) > 1 and len({groups[process] for process in holders}) == 1:
                sent[min(holders)].append(number)
        self.own = [number for number, shard in enumerate(self._shards) if self._own_devices(shard)]
        self.neighbor, self.sent, self.exchanges = neighbor_of(index, hosts), sent[index], any(sent.values())
        self.received = {
            source: numbers for source, numbers in sent.items() if numbers and neighbor_of(source, hosts) == index
        }
        self.leaf_types = leaf_types(abstract_state)
        parts = [self.leaf_types, [(shard.leaf, shard.bounds) for shard in self._shards]]
        self.layout = xxhash.xxh3_64_hexdigest(repr(parts).encode())

    @property
    def num_bytes(self) -> int:
        """Bytes of the shards that this process keeps, its own and those of others."""
        return sum(self._shards[number].num_bytes for number in self.places)

    @property
    def places(self) -> dict[int, Place]:
        """Where the shards are that this process keeps, by number."""
        kept = {*self.own}.union(*self.received.values())
        return {number: (self._shards[number].leaf, self._shards[number].bounds) for number in sorted(kept)}

    def to_host(self, state: State) -> dict[int, memoryview]:
        """Returns the bytes of the own shards of a state by number, on the host.

        On CPU these are views; JAX does not reuse a buffer while a view of it exists.
        """
        parts: dict[int, jax.Array] = {}
        for leaf, array in enumerate(jax.tree.leaves(state)):
            for shard in array.addressable_shards:
                parts[self._numbers[leaf, _bounds(shard.index, array.shape)]] = shard.data
        with jax.transfer_guard("allow"):
            for part in parts.values():
                part.copy_to_host_async()
            return {number: _bytes_of(np.asarray(part)) for number, part in parts.items()}

    def to_devices(self, contents: dict[int, Any]) -> State:
        """Returns the state whose own shards have these bytes, and takes each out once it is on its devices."""
        leaves, structure = jax.tree.flatten(self._abstract_state)
        arrays: list[list[jax.Array]] = [[] for _ in leaves]
        with jax.transfer_guard("allow"):
            for number in self.own:
                shard = self._shards[number]
                values = np.ndarray(shard.shape, shard.dtype, contents.pop(number))
                arrays[shard.leaf] += place(values, leaves[shard.leaf], self._own_devices(shard))
        return jax.tree.unflatten(
            structure,
            [
                jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)
                for leaf, parts in zip(leaves, arrays, strict=True)
            ],
        )

    # Shards of another layout

    def needed(self, places: Mapping[int, Place], process: int) -> list[int]:
        """Returns the shards of another layout that have a part of the shards of a process."""
        by_leaf = _by_leaf(places)
        parts: dict[int, set[Bounds]] = {}
        for shard in self._shards:
            if any(device.process_index == process for device in shard.devices):
                parts.setdefault(shard.leaf, set()).add(shard.bounds)
        return [
            number
            for leaf, wanted in parts.items()
            for number, bounds in by_leaf.get(leaf, ())
            if any(_overlap(bounds, each) is not None for each in wanted)
        ]

    def lacks(self, places: Mapping[int, Place]) -> int:
        """Returns how many own shards cannot be put together from shards of another layout."""
        by_leaf, lacking = _by_leaf(places), 0
        for number in self.own:
            shard = self._shards[number]
            others = {bounds for _, bounds in by_leaf.get(shard.leaf, ())}  # a layout has each element in one of them
            overlaps = [overlap for each in others if (overlap := _overlap(each, shard.bounds)) is not None]
            found = sum(math.prod(stop - start for start, stop in overlap) for overlap in overlaps)
            lacking += found != math.prod(shard.shape)
        return lacking

    def put_together(self, contents: Mapping[int, Any], places: Mapping[int, Place]) -> dict[int, memoryview]:
        """Returns the bytes of the own shards by number, from those of shards of another layout."""
        by_leaf, found = _by_leaf({number: places[number] for number in contents}), dict[int, memoryview]()
        for number in self.own:
            shard = self._shards[number]
            values = np.empty(shard.shape, shard.dtype)
            for other, bounds in by_leaf.get(shard.leaf, ()):
                if (overlap := _overlap(bounds, shard.bounds)) is not None:
                    part = np.ndarray([stop - start for start, stop in bounds], shard.dtype, contents[other])
                    values[_within(overlap, shard.bounds)] = part[_within(overlap, bounds)]
            found[number] = _bytes_of(values)
        return found

    def _own_devices(self, shard: Shard) -> list[Any]:
        return [device for device in shard.devices if device.process_index == self._index]


def groups_by_host(hosts: Sequence[str]) -> list[str]:
    """Returns for each process what it may be lost together with: its host; itself if there is one host only."""
    return [*hosts] if len({*hosts}) > 1 else [f"process {index}" for index in range(len(hosts))]


def neighbor_of(process: int, hosts: Sequence[str]) -> int:
    """Returns the process that keeps copies for a process: that with the same number on the next host."""
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups := groups_by_host(hosts)):
        members.setdefault(group, []).append(index)
    names = [*members]
    others = members[names[(names.index(groups[process]) + 1) % len(names)]]
    return others[members[groups[process]].index(process) % len(others)]


def _shards_of(leaf: int, array: jax.ShapeDtypeStruct) -> list[Shard]:
    devices: dict[Bounds, list[Any]] = {}
    sharding = cast(jax.sharding.Sharding, array.sharding)
    for device, index in sharding.devices_indices_map(array.shape).items():
        devices.setdefault(_bounds(index or (), array.shape), []).append(device)
    return [Shard(leaf, bounds, np.dtype(array.dtype), tuple(devices[bounds])) for bounds in sorted(devices)]


def _bounds(index: tuple[slice, ...], shape: Sequence[int]) -> Bounds:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _by_leaf(places: Mapping[int, Place]) -> dict[int, list[tuple[int, Bounds]]]:
    found: dict[int, list[tuple[int, Bounds]]] = {}
    for number, (leaf, bounds) in places.items():
        found.setdefault(leaf, []).append((number, bounds))
    return found


def _overlap(one: Bounds, other: Bounds) -> Bounds | None:
    """Returns what two parts of an array have in common, None if that is nothing."""
    found = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return found if all(start < stop for start, stop in found) else None


def _within(part: Bounds, whole: Bounds) -> tuple[slice, ...]:
    """Returns the indices of a part in a shard with these bounds."""
    return tuple(slice(start - first, stop - first) for (start, stop), (first, _) in zip(part, whole, strict=True))


def _bytes_of(values: np.ndarray) -> memoryview:
    return memoryview(np.ascontiguousarray(values).reshape(-1).view(np.uint8))
