"""Reads the collectives out of a compiled program's text: what, over which mesh axes, inside how many loops.

Not for times or for what a back end does below HLO. Whatever it does not understand is an error: a group that is
no product of mesh axes, or a form of groups that it does not know.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}

_HEADER = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (?P<type>.*?) ?\b(?P<kind>[a-z][a-z0-9-]*)\(")
_CALLS = re.compile(r"\b(\w+)=\{?(%[\w.-]+(?:, %[\w.-]+)*)")
_ARRAY = re.compile(r"\b([a-z]+[0-9]*)\[([0-9,]*)\]")


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective instruction.

    Attributes:
        kind: one of `KINDS`.
        axes: the mesh axes that it crosses, in the order of the mesh; none if every device is a group of its own.
        loops: while loops around it.
        arrays: bytes on one device of every array that it yields.
    """

    kind: str
    axes: tuple[str, ...]
    loops: int
    arrays: tuple[int, ...]


def collectives(text: str, mesh: dict[str, int]) -> list[Collective]:
    """All collectives, once for each way from the entry to them.

    Args:
        text: `compiled.as_text()`.
        mesh: size of every mesh axis, in order.
    """
    found = []
    for line, loops in _executed(text):
        instruction = _INSTRUCTION.match(line)
        kind = instruction["kind"].removesuffix("-start") if instruction else ""
        if instruction is None or kind not in KINDS:
            continue
        axes = _axes(_groups(line), mesh)
        found.append(Collective(kind=kind, axes=axes, loops=loops, arrays=_arrays(instruction["type"])))
    return found


def _executed(text: str) -> Iterator[tuple[str, int]]:
    """The lines of all computations that run, with the number of while loops around them."""
    computations: dict[str, list[str]] = {}
    entry, name = "", ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name = header["name"]
            computations[name] = []
            entry = name if header["entry"] else entry
        elif name:
            computations[name].append(line)

    def visit(name: str, loops: int) -> Iterator[tuple[str, int]]:
        for line in computations[name]:
            yield line, loops
            for attribute, called in _CALLS.findall(line):
                looped = attribute in ("body", "condition")
                for other in called.replace("%", "").split(", "):
                    if other in computations:
                        yield from visit(other, loops + looped)

    return visit(entry, 0)


def _arrays(shape: str) -> tuple[int, ...]:
    """Bytes of the arrays of a type: `f32[2,8]{1,0}`, or several in parentheses."""
    shapes = _ARRAY.findall(re.sub(r"/\*.*?\*/", "", shape))
    return tuple(BYTES[dtype] * math.prod(int(d) for d in dims.split(",") if d) for dtype, dims in shapes)


def _groups(line: str) -> list[list[int]]:
    """Groups of partitions that exchange data, from any of the forms that XLA prints."""
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", line):
        return _listed(pairs[1])
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", line):
        return _listed(listed[1])
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, reshaped, order = (_numbers(part) for part in iota.groups(default=""))
        devices = np.arange(math.prod(shape)).reshape(reshaped)
        return devices.transpose(order or None).reshape(shape).tolist()
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        return _named({name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}, named[2])
    raise ValueError(f"a form of replica groups that is not known here: {line.strip()}")


def _listed(groups: str) -> list[list[int]]:
    """`{0,1},{2,3}`."""
    return [_numbers(group) for group in re.findall(r"\{([\d,]*)\}", groups)]


def _named(sizes: dict[str, int], axes: str) -> list[list[int]]:
    """Groups along axes of a mesh over devices in order."""
    names = list(sizes)
    along = [names.index(name) for name in re.findall(r"'(\w+)'", axes)]
    if ":" in axes:
        raise ValueError(f"a part of a mesh axis is not known here: {axes}")
    devices = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    group = math.prod(devices.shape[axis] for axis in along)
    return np.moveaxis(devices, along, range(-len(along), 0)).reshape(-1, group).tolist()


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _axes(groups: Sequence[Sequence[int]], mesh: dict[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the devices of each group differ."""
    crossed = set()
    for group in groups:
        places = np.array(np.unravel_index(np.array(group), tuple(mesh.values())))
        crossed.add(tuple(axis for axis, place in zip(mesh, places, strict=True) if len(set(place)) > 1))
    if len(crossed) != 1:
        raise ValueError(f"groups that cross different mesh axes: {groups}")
    (axes,) = crossed
    return axes
