"""Reads the time of each operation of a program from a profiler trace, and its source line from the loaded programs.

A trace (xplane.pb) has events with the name of an HLO instruction and of its program. The line of Python that made the
instruction is in the text of the compiled program, which JAX keeps in memory.
"""

import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

PACKAGE = Path(__file__).resolve().parents[1]

# An operation is shown with the line that calls these building blocks, not with a line in them.
_BUILDING_BLOCKS = tuple(str(PACKAGE / part) for part in ("ops", "parallel", "models/layers.py"))
_CONTROL_FLOW = frozenset({"while", "conditional", "call"})  # their time is that of the operations inside

# `  ROOT %dot.1 = f32[8,8]{1,0} dot(%a, %b), metadata={op_name="jit(f)/dot_general" stack_frame_id=7}`
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(?P<name>[\w.-]+) = .*? (?P<opcode>[a-z][a-z0-9-]*)\(")
_OP_NAME = re.compile(r'\bop_name="([^"]*)"')
_FRAME_ID = re.compile(r"\bstack_frame_id=(\d+)")
# Lines of the tables before the instructions: `3 "/a/layers.py"`, `5 {file_name_id=3 function_name_id=1 line=7 ...}`.
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
_TABLE_LINE = re.compile(r'^(?P<id>\d+) (?:"(?P<text>.*)"|\{(?P<fields>.*)\})$')
_FIELD = re.compile(r"(\w+)=(\d+)")


@dataclass(frozen=True, kw_only=True)
class Operation:
    """An HLO instruction.

    Attributes:
        opcode: such as `fusion`.
        kind: the JAX primitive that it comes from, and the pass, such as `dot_general, backward`; if the compiler has
            added it, its name without the number.
        source: `FILE:LINE` of the line of Python that it comes from; "" if the compiler has added it.
    """

    opcode: str
    kind: str
    source: str


@dataclass(frozen=True, kw_only=True)
class OperationTime:
    """The time of the operations of one kind and source line, summed over devices and steps."""

    kind: str
    source: str
    names: tuple[str, ...]  # the one with the most time first
    calls: int
    seconds: float


def operation_times(xplane: Path) -> list[OperationTime]:
    """Returns the operations in a trace by their time, the longest first, with those of one source line added up."""
    programs = dict(_loaded_programs())
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    calls: dict[tuple[str, str], int] = defaultdict(int)
    with warnings.catch_warnings():
        # jaxlib's iterators have no module; where that warning is an error, C++ ends the process.
        warnings.filterwarnings("ignore", "builtin type .* has no __module__", DeprecationWarning)
        for program, name, duration_s in _events(xplane):
            seconds[program, name] += duration_s
            calls[program, name] += 1
    groups: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for program, name in sorted(seconds, key=lambda key: -seconds[key]):
        operation = _find(programs, program, name)
        if operation.opcode not in _CONTROL_FLOW:
            groups[operation.kind, operation.source].append((program, name))
    times = [
        OperationTime(
            kind=kind,
            source=source,
            names=tuple(name for _, name in keys),
            calls=sum(calls[key] for key in keys),
            seconds=sum(seconds[key] for key in keys),
        )
        for (kind, source), keys in groups.items()
    ]
    return sorted(times, key=lambda time: -time.seconds)


def _find(programs: Mapping[str, Mapping[str, Operation]], program: str, name: str) -> Operation:
    """Returns an operation by the name of its program; without one, from any program that has it."""
    for operations in [programs[program]] if program in programs else programs.values():
        if name in operations:
            return operations[name]
    kind = _without_number(name)
    return Operation(opcode=kind, kind=kind, source="")


def _without_number(name: str) -> str:
    """Returns `copy` for `copy.12`."""
    return name.rstrip(".0123456789")


def _events(xplane: Path) -> Iterator[tuple[str, str, float]]:
    """Yields program, operation and seconds of each run of an operation on a device.

    GPUs and CPUs name both in the event; a CPU is in the plane of the host. TPUs have a line for operations, whose
    events have the name of the instruction or its whole text.
    """
    planes = list(jax.profiler.ProfileData.from_file(str(xplane)).planes)
    # Not all of "/device:": once libtpu is loaded there is an empty "/device:CUSTOM:Megascale Trace".
    on_devices = [plane for plane in planes if plane.name.startswith(("/device:GPU", "/device:TPU"))]
    for plane in on_devices or planes:
        lines = list(plane.lines)
        op_lines = [line for line in lines if line.name == "XLA Ops"]
        for line in op_lines or lines:
            for event in line.events:
                stats = dict(event.stats)
                if "hlo_op" in stats:
                    yield str(stats.get("hlo_module", "")), str(stats["hlo_op"]), event.duration_ns / 1e9
                elif op_lines:
                    yield "", event.name.removeprefix("%").partition(" ")[0], event.duration_ns / 1e9


def _loaded_programs() -> Iterator[tuple[str, dict[str, Operation]]]:
    """Yields the name of each compiled program in memory, and its operations by name."""
    for executable in jax.local_devices()[0].client.live_executables():
        for module in executable.hlo_modules():
            yield module.name, parse_program(module.to_string())


def parse_program(text: str) -> dict[str, Operation]:
    """Parses the text of a compiled program: its operations by name, with their source lines."""
    tables: dict[str, dict[int, Any]] = {name: {} for name in _TABLES}
    operations: dict[str, Operation] = {}
    table: dict[int, Any] | None = None
    frames: _Frames | None = None
    for line in text.splitlines():
        if line in tables:
            table = tables[line]
        elif table is not None and (entry := _TABLE_LINE.match(line)):
            value = entry["text"] or {name: int(number) for name, number in _FIELD.findall(entry["fields"] or "")}
            table[int(entry["id"])] = value
        elif instruction := _INSTRUCTION.match(line):
            frames = frames or _Frames(tables)
            op_name, frame_id = _OP_NAME.search(line), _FRAME_ID.search(line)
            name = instruction["name"]
            kind = _kind(op_name[1]) if op_name else _without_number(name)
            source = frames.source(int(frame_id[1])) if frame_id else ""
            operations[name] = Operation(opcode=instruction["opcode"], kind=kind, source=source)
    return operations


class _Frames:
    """The call stacks in the text of a program."""

    def __init__(self, tables: Mapping[str, Mapping[int, Any]]):
        self._files, self._locations, self._frames = tables["FileNames"], tables["FileLocations"], tables["StackFrames"]
        # The text has the number of a frame's parent plus one in some versions of XLA; the first frame has no parent.
        self._no_parent = self._frames.get(1, {}).get("parent_frame_id", 0)

    def source(self, frame: int) -> str:
        """Returns `FILE:LINE` of the innermost frame outside of installed packages and building blocks."""
        calls = [(self._files[location["file_name_id"]], location["line"]) for location in self._stack(frame)]
        own = [call for call in calls if not _is_installed(call[0])] or calls
        file, line = next((call for call in own if not call[0].startswith(_BUILDING_BLOCKS)), own[0])
        return f"{_short(file)}:{line}"

    def _stack(self, frame: int) -> Iterable[Mapping[str, int]]:
        """Yields the locations of a call stack, the innermost first."""
        while frame in self._frames:
            yield self._locations[self._frames[frame]["file_location_id"]]
            frame = self._frames[frame].get("parent_frame_id", 0) - self._no_parent


def _is_installed(file: str) -> bool:
    return "site-packages" in file and not file.startswith(f"{PACKAGE}/")


def _short(file: str) -> str:
    """Returns a path below this package or the working directory without its start."""
    for parent in (PACKAGE.parent, Path.cwd()):
        if Path(file).is_relative_to(parent):
            return str(Path(file).relative_to(parent))
    return file


def _kind(op_name: str) -> str:
    """Returns `dot_general, backward` for `jit(step)/transpose(jvp())/while/body/dot_general`."""
    primitive = op_name.rpartition("/")[2].removeprefix("jit(").removesuffix(")")
    if "rematted_computation" in op_name:
        return f"{primitive}, recomputed"
    return f"{primitive}, backward" if "transpose(" in op_name else primitive
