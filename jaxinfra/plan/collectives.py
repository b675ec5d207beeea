"""The collectives of a compiled program: what, over which mesh axes and links, inside how many loops, how often.

Judged by groups and shapes, because the names in the text mislead. A TPU program has hardly any reduce-scatter:
there is an all-reduce whose result is sliced, fused with the slice (then it moves what a reduce-scatter moves) or not
(then every device gets the whole sum and keeps its part). What starts and is waited for later counts once. What
leaves a TPU slice stands in the text as a send to the runtime that joins slices ("megascale").
"""

import itertools
import math
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from jaxinfra.plan.hlo import Computation, Instruction, Module, Place

RAGGED = "ragged-all-to-all"
KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    RAGGED,
    "reduce-scatter",
)
SLICED = "all-reduce+slice"
"""An all-reduce of which every device keeps only its slice, where the two are separate operations."""

type Link = Literal["local", "network"]

_MEGASCALE = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_CHANGED_FORM = ("bitcast", "convert", "copy", "copy-start", "copy-done", "reshape", "transpose")


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective operation, at one place of the program.

    Attributes:
        kind: one of `KINDS`, or `SLICED`.
        axes: the mesh axes along which the devices of a group differ, in the order of the mesh; none if every device is
            a group of its own.
        link: "network" if a group joins slices of TPUs or hosts of GPUs, else "local".
        loops: while loops around it.
        times: how often it runs in one step.
        arrays: bytes on one device of every array: gathered, of a reduce-scatter the whole before it is reduced. What
            is sent between slices is padded to the tiles of the chip. Of a ragged exchange, whose text has no number of
            rows, the smaller of what could be sent and what there is room for.
    """

    kind: str
    axes: tuple[str, ...]
    link: Link
    loops: int
    times: int
    arrays: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """All collectives of one kind over the same axes and links in equally many loops.

    Attributes:
        arrays: arrays in the text.
        runs: arrays moved in one step.
        bytes: of these, on one device.
    """

    loops: int
    kind: str
    axes: tuple[str, ...]
    link: Link
    arrays: int
    runs: int
    bytes: int


def summed(found: Sequence[Collective]) -> list[Traffic]:
    """A table: outer loops first, then by kind, axes and link."""
    rows: dict[tuple[int, str, tuple[str, ...], Link], list[int]] = {}
    for one in found:
        row = rows.setdefault((one.loops, one.kind, one.axes, one.link), [0, 0, 0])
        row[0] += len(one.arrays)
        row[1] += len(one.arrays) * one.times
        row[2] += sum(one.arrays) * one.times
    return [
        Traffic(loops=loops, kind=kind, axes=axes, link=link, arrays=arrays, runs=runs, bytes=size)
        for (loops, kind, axes, link), (arrays, runs, size) in sorted(rows.items())
    ]


def collectives(module: Module, mesh: Mapping[str, int], domains: Sequence[int] | None = None) -> list[Collective]:
    """All collectives, once for each way from the entry to them; of a choice those of the branch that moves most.

    Args:
        module: the program.
        mesh: size of every mesh axis, in order. Partition i of the program is the i-th device of the mesh.
        domains: of every device of the mesh, in its order, the slice or host that it is in; None is one for all.
    """
    reader = _Reader(module, mesh, domains)

    def moved_bytes(place: Place) -> int:
        return sum(sum(one.arrays) * one.times for one in reader.at(place))

    return [one for place in module.executed(moved_bytes) for one in reader.at(place)]


class _Reader:
    def __init__(self, module: Module, mesh: Mapping[str, int], domains: Sequence[int] | None):
        count = math.prod(mesh.values())
        self.module, self.mesh = module, dict(mesh)
        self.domains = np.zeros(count, int) if domains is None else np.asarray(domains)
        if module.partitions not in (1, count):
            # The text is of one slice: `replica`, outermost, is what it has of it.
            slices = len(set(self.domains.tolist()))
            assert module.partitions * slices == count, (module.partitions, slices, count)
            outermost = next(iter(mesh))
            self.mesh = {**mesh, outermost: mesh[outermost] // slices}
            self.domains = self.domains[: module.partitions]
        self.outermost = next(iter(mesh))

    def at(self, place: Place) -> Iterator[Collective]:
        instructions = place.computation.instructions.values()
        starts = [i for i in instructions if 'custom_call_target="AsyncCollectiveStart"' in i.attributes]
        for instruction in instructions:
            kind = instruction.kind.removesuffix("-start")
            megascale = _MEGASCALE.search(instruction.attributes) if instruction.kind == "send" else None
            if megascale:
                kind, axes, link = megascale[1].lower().replace("_", "-"), (self.outermost,), "network"
                whole, sliced = instruction.arrays[:1], ()
            elif kind in KINDS and not ("chain_id=" in instruction.attributes and not starts):
                # The parts of an asynchronous chain of fusions all name the collective; its start counts.
                axes, link = self._crossed(_groups(instruction.attributes, len(self.domains)))
                whole, sliced = self._arrays(kind, instruction, place.computation)
            else:
                continue
            reduced = "reduce-scatter" if place.fused else SLICED
            for each, arrays in ((kind, whole), (reduced, sliced)):
                if arrays:
                    yield Collective(
                        kind=each, axes=axes, link=link, loops=place.loops, times=place.times, arrays=arrays
                    )

    def _arrays(
        self, kind: str, instruction: Instruction, computation: Computation
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Bytes of its arrays: of those that are used whole, and of the sums that are only sliced."""
        sizes, yielder = instruction.arrays, instruction
        if instruction.kind.endswith("-start"):
            count = len(instruction.operands)
            results = 1 if kind == RAGGED else count
            if len(sizes) >= count + results:  # the operands stand before the results, counters of the chip behind
                sizes = sizes[count : count + results]
            done = (u for u in computation.users.get(instruction.name, []) if u.kind == f"{kind}-done")
            yielder = next(done, instruction)
        if kind == RAGGED:
            rows = sum(computation.instructions[instruction.operands[0]].arrays)
            return (min(rows, *sizes),), ()
        if kind == "reduce-scatter":
            group = max(map(len, _groups(instruction.attributes, len(self.domains))))
            sizes = tuple(size * group for size in sizes)
        if kind != "all-reduce":
            return sizes, ()
        names: list[str | None] = [yielder.name]
        if yielder.type.startswith("("):
            users = computation.users.get(yielder.name, [])
            taken = {user.index: user.name for user in users}
            names = [taken.get(index) for index in range(len(sizes))]
        sliced = [name is not None and self._only_sliced(computation, name) for name in names]
        cut = tuple(itertools.compress(sizes, sliced))
        return tuple(itertools.compress(sizes, map(operator.not_, sliced))), cut

    def _only_sliced(self, computation: Computation, name: str) -> bool:
        """Whether nothing is done with an array but to take a slice of it."""
        users = computation.users.get(name, [])
        return bool(users) and all(self._slices(computation, user, name) for user in users)

    def _slices(self, computation: Computation, user: Instruction, name: str) -> bool:
        if user.kind == "dynamic-slice":
            return user.operands[0] == name
        if user.kind in _CHANGED_FORM:
            return self._only_sliced(computation, user.name)
        if user.kind != "fusion":
            return False
        inside = self.module.computations[user.calls["calls"][0]]
        places = [inside.parameter(number) for number, operand in enumerate(user.operands) if operand == name]
        return all(place is not None and self._only_sliced(inside, place) for place in places)

    def _crossed(self, groups: Sequence[Sequence[int]]) -> tuple[tuple[str, ...], Link]:
        """The mesh axes and links that the devices of each group are apart by."""
        crossed: set[str] = set()
        network = False
        for group in groups:
            places = np.array(np.unravel_index(np.array(group), tuple(self.mesh.values())))
            crossed.update(axis for axis, place in zip(self.mesh, places, strict=True) if len(set(place)) > 1)
            network = network or len(set(self.domains[list(group)])) > 1
        return tuple(axis for axis in self.mesh if axis in crossed), "network" if network else "local"


def _groups(attributes: str, devices: int) -> list[list[int]]:
    """Groups of partitions that exchange data, from any of the forms that XLA prints; a ValueError for others."""
    if listed := re.search(r"(?:source_target_pairs|replica_groups)=\{(\{.*?\})\}", attributes):
        return [_numbers(group) for group in re.findall(r"\{([\d,]*)\}", listed[1])]
    if "replica_groups={}" in attributes:
        return [list(range(devices))]
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, reshaped, order = (_numbers(part) for part in iota.groups(default=""))
        ids = np.arange(math.prod(shape)).reshape(reshaped)
        return ids.transpose(order or None).reshape(shape).tolist()
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        return _named({name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])}, named[2])
    raise ValueError(f"a form of replica groups that is not known here: {attributes[:500]}")


def _named(sizes: dict[str, int], axes: str) -> list[list[int]]:
    """Groups along axes of a mesh over devices in order, or along a part of one: `'fsdp':(2)4`.

    The part is the middle of three: 2 times it, and within it what is left of the axis.
    """
    shape: list[int] = []
    along: list[int] = []
    found = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
    parts = {name: (int(before or 0), int(size or 0)) for name, before, size in found}
    for name, size in sizes.items():
        before, middle = parts.get(name, (size, 1))
        if name in parts and not middle:
            before, middle = 1, size
        along.extend([len(shape) + 1] if name in parts else [])
        shape.extend((before, middle, size // (before * middle)))
    ids = np.arange(math.prod(sizes.values())).reshape(shape)
    group = math.prod(shape[axis] for axis in along)
    return np.moveaxis(ids, along, range(-len(along), 0)).reshape(-1, group).tolist()


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]
