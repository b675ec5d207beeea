"""Lists the collectives of a compiled program: kind, mesh axes, links, enclosing loops, runs per step and bytes.

Two forms in the text need care:
- The TPU compiler writes most reduce-scatters as an all-reduce of which each device then keeps only a slice. If the two
  are fused, they move as many bytes as a reduce-scatter, and are listed as one. If not, each device receives all of the
  sum.
- Transfers between TPU slices are sends to megascale, the runtime that joins slices.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from jaxinfra.plan.hlo import Call, Computation, HloModule, Instruction

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
ALL_REDUCE_SLICE = "all-reduce+slice"
"""Kind of an all-reduce of which each device only keeps a slice, with a separate operation."""

type Link = Literal["local", "network"]

_MEGASCALE = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
# Opcodes that change the layout, dtype or shape of an array, but not its values.
_RESHAPING = ("bitcast", "convert", "copy", "copy-start", "copy-done", "reshape", "transpose")


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective operation."""

    kind: str  # one of `KINDS`, or `ALL_REDUCE_SLICE`
    axes: tuple[str, ...]  # mesh axes that its groups span, in the order of the mesh; empty if each group is one device
    link: Link  # "network" if a group spans several TPU slices or GPU hosts
    loops: int  # while loops around it
    runs: int  # in one step
    # Bytes of each array on one device: after a gather, before a reduce-scatter. Between slices they include padding to
    # the chip's tiles. A ragged all-to-all, whose number of rows is not static, counts as its smaller buffer.
    array_bytes: tuple[int, ...]
    instruction: str = field(default="", compare=False)  # its name in the text
    group: tuple[int, ...] = field(default=(), compare=False)  # one of the groups of devices that exchange data


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """All collectives of one kind over the same axes and links, at the same loop depth."""

    loops: int
    kind: str
    axes: tuple[str, ...]
    link: Link
    arrays: int  # in the text
    runs: int  # arrays moved in one step
    bytes: int  # moved in one step, on one device


def summarize(collectives: Sequence[Collective]) -> list[Traffic]:
    """Sums the collectives of equal loop depth, kind, axes and link; sorts the sums by these."""
    groups: defaultdict[tuple[int, str, tuple[str, ...], Link], list[Collective]] = defaultdict(list)
    for each in collectives:
        groups[each.loops, each.kind, each.axes, each.link].append(each)
    return [
        Traffic(
            loops=loops,
            kind=kind,
            axes=axes,
            link=link,
            arrays=sum(len(each.array_bytes) for each in group),
            runs=sum(len(each.array_bytes) * each.runs for each in group),
            bytes=sum(sum(each.array_bytes) * each.runs for each in group),
        )
        for (loops, kind, axes, link), group in sorted(groups.items())
    ]


def find_collectives(
    module: HloModule, mesh: Mapping[str, int], slice_ids: Sequence[int] | None = None
) -> list[Collective]:
    """Finds all collectives; of a conditional, only the branch that moves the most bytes counts.

    Args:
        module: the program; its partition i runs on the i-th device of the mesh.
        mesh: size of every mesh axis, in order.
        slice_ids: the number of the TPU slice or GPU host of each device of the mesh; None if all are in one.
    """
    return CollectiveFinder(module, mesh, slice_ids).all()


class CollectiveFinder:
    """Finds the collectives of one module; `slice_ids` has one number for each partition of the module."""

    def __init__(self, module: HloModule, mesh: Mapping[str, int], slice_ids: Sequence[int] | None):
        num_devices = math.prod(mesh.values())
        self.module, self.mesh = module, dict(mesh)
        self.slice_ids = np.zeros(num_devices, int) if slice_ids is None else np.asarray(slice_ids)
        self.outer_axis = next(iter(mesh))
        if module.num_partitions not in (1, num_devices):
            # The text is the program of one slice, which has only a part of the outermost axis: with two slices, the
            # mesh {replica: 4, fsdp: 8} becomes {replica: 2, fsdp: 8}.
            num_slices = len(set(self.slice_ids.tolist()))
            assert module.num_partitions * num_slices == num_devices, (module.num_partitions, num_slices, num_devices)
            self.mesh[self.outer_axis] //= num_slices
            self.slice_ids = self.slice_ids[: module.num_partitions]

    def all(self) -> list[Collective]:
        """Returns those of the whole program; see `find_collectives`."""

        def moved_bytes(call: Call) -> int:
            return sum(sum(each.array_bytes) * each.runs for each in self.find(call))

        return [each for call in self.module.calls(moved_bytes) for each in self.find(call)]

    def find(self, call: Call) -> Iterator[Collective]:
        """Yields the collectives of one computation; the computations that it calls are other calls."""
        instructions = call.computation.instructions.values()
        has_async_start = any('custom_call_target="AsyncCollectiveStart"' in i.attributes for i in instructions)
        for instruction in instructions:
            kind = instruction.opcode.removesuffix("-start")
            megascale = _MEGASCALE.search(instruction.attributes) if instruction.opcode == "send" else None
            if megascale:
                kind = megascale[1].lower().replace("_", "-")  # ALL_REDUCE is all-reduce
                axes, link, groups = (self.outer_axis,), "network", [[]]
                whole, sliced = instruction.array_bytes[:1], ()
            elif kind in KINDS and (has_async_start or "chain_id=" not in instruction.attributes):
                # In a chain of asynchronous fusions every part names the collective; only its start is listed.
                groups = _device_groups(instruction.attributes, len(self.slice_ids))
                axes, link = self._spanned(groups)
                whole, sliced = self._array_bytes(kind, instruction, call.computation, max(map(len, groups)))
            else:
                continue
            sliced_kind = "reduce-scatter" if call.fused else ALL_REDUCE_SLICE
            for each_kind, sizes in ((kind, whole), (sliced_kind, sliced)):
                if sizes:
                    yield Collective(
                        kind=each_kind,
                        axes=axes,
                        link=link,
                        loops=call.loops,
                        runs=call.runs,
                        array_bytes=sizes,
                        instruction=instruction.name,
                        group=tuple(groups[0]),
                    )

    def _array_bytes(
        self, kind: str, instruction: Instruction, computation: Computation, group_size: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the bytes of each array whose result is used whole, then of each of which only a slice is used."""
        sizes, result = instruction.array_bytes, instruction
        if instruction.opcode.endswith("-start"):
            num_operands = len(instruction.operands)
            num_results = 1 if kind == RAGGED else num_operands
            # The result of a start is (operands, results, counters of the chip), or the results alone.
            if len(sizes) >= num_operands + num_results:
                sizes = sizes[num_operands : num_operands + num_results]
            users = computation.users.get(instruction.name, [])
            result = next((user for user in users if user.opcode == f"{kind}-done"), instruction)
        if kind == RAGGED:
            sent = sum(computation.instructions[instruction.operands[0]].array_bytes)
            return (min(sent, *sizes),), ()
        if kind == "reduce-scatter":  # its results are the shards: count the arrays before it
            return tuple(size * group_size for size in sizes), ()
        if kind != "all-reduce":
            return sizes, ()
        # The name of each array of the result: its own, or that of the `get-tuple-element` that takes it from a tuple.
        names: list[str | None] = [result.name]
        if result.shape.startswith("("):
            elements = {user.tuple_index: user.name for user in computation.users.get(result.name, [])}
            names = [elements.get(index) for index in range(len(sizes))]
        whole, sliced = [], []
        for name, size in zip(names, sizes, strict=True):
            only_sliced = name is not None and self._only_sliced(computation, name)
            (sliced if only_sliced else whole).append(size)
        return tuple(whole), tuple(sliced)

    def _only_sliced(self, computation: Computation, name: str) -> bool:
        """Tells whether all users of an array slice it."""
        users = computation.users.get(name, [])
        return bool(users) and all(self._slices(computation, user, name) for user in users)

    def _slices(self, computation: Computation, user: Instruction, name: str) -> bool:
        """Tells whether `user` slices the array `name`: directly, after a reshape or the like, or inside a fusion."""
        if user.opcode == "dynamic-slice":
            return user.operands[0] == name
        if user.opcode in _RESHAPING:
            return self._only_sliced(computation, user.name)
        if user.opcode != "fusion":
            return False
        fused = self.module.computations[user.callees["calls"][0]]
        parameters = [fused.parameter(number) for number, operand in enumerate(user.operands) if operand == name]
        return all(parameter is not None and self._only_sliced(fused, parameter) for parameter in parameters)

    def _spanned(self, groups: Sequence[list[int]]) -> tuple[tuple[str, ...], Link]:
        """Returns the mesh axes along which the devices of a group differ, and the slowest link between them."""
        spanned: set[str] = set()
        link: Link = "local"
        for group in groups:
            # One row per axis: in a mesh of 2 x 4, devices [1, 5] have the coordinates [[0, 1], [1, 1]].
            coordinates = np.unravel_index(group, tuple(self.mesh.values()))
            spanned.update(axis for axis, row in zip(self.mesh, coordinates, strict=True) if len(set(row)) > 1)
            if len(set(self.slice_ids[group])) > 1:
                link = "network"
        return tuple(axis for axis in self.mesh if axis in spanned), link


def _device_groups(attributes: str, num_devices: int) -> list[list[int]]:
    """Parses the groups of partitions that exchange data; raises ValueError for an unknown form."""
    if listed := re.search(r"(?:source_target_pairs|replica_groups)=\{(\{.*?\})\}", attributes):
        return [_integers(group) for group in re.findall(r"\{([\d,]*)\}", listed[1])]
    if "replica_groups={}" in attributes:
        return [list(range(num_devices))]
    # `[4,2]<=[2,4]T(1,0)` is arange(8).reshape(2, 4).transpose(1, 0).reshape(4, 2).
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, reshape_dims, transpose_perm = map(_integers, iota.groups(default=""))
        ids = np.arange(math.prod(shape)).reshape(reshape_dims)
        return ids.transpose(transpose_perm or None).reshape(shape).tolist()
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        mesh = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        return _mesh_groups(mesh, named[2])
    raise ValueError(f"unknown form of replica groups in HLO text: {attributes[:500]}")


def _mesh_groups(mesh: Mapping[str, int], axes: str) -> list[list[int]]:
    """Returns the groups along mesh axes such as `'fsdp','tensor'`, or along sub-axes such as `'fsdp':(2)4`.

    The sub-axis (2)4 of an axis of 16 splits it into dimensions of 2, 4 and 2; groups are along the second.
    """
    matches = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
    # By axis: the sizes of the first and second dimension. A whole axis of 8 is split into 1, 8 and 1.
    sub_axes = {name: (int(before), int(size)) if size else (1, mesh[name]) for name, before, size in matches}
    shape: list[int] = []
    group_dims: list[int] = []
    for name, size in mesh.items():
        before, sub_size = sub_axes.get(name, (1, 1))
        if name in sub_axes:
            group_dims.append(len(shape) + 1)
        shape.extend((before, sub_size, size // (before * sub_size)))
    ids = np.arange(math.prod(shape)).reshape(shape)
    group_size = math.prod(shape[dim] for dim in group_dims)
    return np.moveaxis(ids, group_dims, range(-len(group_dims), 0)).reshape(-1, group_size).tolist()


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]
