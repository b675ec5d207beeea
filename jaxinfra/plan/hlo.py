"""Parses the text of a compiled XLA program (scheduled HLO) and counts how often each computation runs.

A program is a list of computations, such as

    %add (a: f32[], b: f32[]) -> f32[] {
      %a = f32[] parameter(0)
      %b = f32[] parameter(1)
      ROOT %sum = f32[] add(%a, %b)
    }

and an instruction may call others: `%y = f32[8]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add`.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

NO_ESTIMATE = 2**63 - 1
"""Cycles that the TPU compiler writes for an instruction that it cannot estimate."""

# `ENTRY %main (x: f32[8]) -> f32[8] {`
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$", re.DOTALL)
# `  ROOT %sum = f32[] add(`; the operands that follow are parsed by `_parse_instruction`. The opcode is the first
# lowercase word before a parenthesis; in a shape such as `(f32[8]{0:T(256)}, s32[])` no parenthesis follows one.
_INSTRUCTION = re.compile(
    r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.-]+) = (?P<shape>.*?) ?\b(?P<opcode>[a-z][a-z0-9-]*)\(", re.DOTALL
)
_CALLEES = re.compile(r"\b(\w+)=\{?(%[\w.-]+(?:, ?%[\w.-]+)*)")  # `to_apply=%add`, `branch_computations={%a, %b}`
_ARRAY = re.compile(r"\b([a-z]+[0-9]*(?:e\d+m\d+\w*)?)\[([0-9,]*)\]")  # `f32[2,8]`, `f8e4m3fn[3]`, `token[]`
_COMMENT = re.compile(r"/\*.*?\*/")  # such as `/*index=1*/`
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_BITS = {"pred": 8, "token": 0}  # the names of other dtypes contain their number of bits
# Opcodes that return the values of their first operand.
_FORWARDING = ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "optimization-barrier")


@dataclass(frozen=True, kw_only=True, slots=True)
class Instruction:
    """One HLO instruction."""

    name: str
    opcode: str
    shape: str  # of its result, such as `f32[2,8]{1,0}`
    operands: tuple[str, ...]  # names of instructions; none for a constant or a parameter
    literal: str  # the value of a short constant, or the number of a parameter, as text; else empty
    attributes: str  # the text after the operands, up to metadata and backend config
    callees: dict[str, tuple[str, ...]]  # names of the computations that it calls, by attribute
    cycles: int | None  # the compiler's estimate
    trip_count: int | None  # of a loop, if the compiler wrote it down

    @property
    def array_bytes(self) -> tuple[int, ...]:
        """Bytes of each array of its result."""
        return array_bytes(self.shape)

    @property
    def called_computations(self) -> tuple[str, ...]:
        """Names of all computations that it calls."""
        return tuple(name for names in self.callees.values() for name in names)

    @property
    def tuple_index(self) -> int | None:
        """Index of a `get-tuple-element`; None for other opcodes."""
        match = re.search(r"\bindex=(\d+)", self.attributes) if self.opcode == "get-tuple-element" else None
        return int(match[1]) if match else None

    def quoted(self, attribute: str) -> str | None:
        """Returns the value of an attribute in quotes, such as `custom_call_target="tpu_custom_call"`."""
        match = re.search(rf'\b{attribute}="([^"]*)"', self.attributes)
        return match[1] if match else None


@dataclass(kw_only=True)
class Computation:
    """Instructions by name, in the order of execution."""

    name: str
    root: str = ""  # name of the instruction whose result is returned
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Maps each instruction's name to the instructions that have it as an operand."""
        users: dict[str, list[Instruction]] = {}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                users.setdefault(operand, []).append(instruction)
        return users

    def parameter(self, number: int) -> str | None:
        """Returns the name of parameter `number`; None if the computation does not declare it."""
        for instruction in self.instructions.values():
            if instruction.opcode == "parameter" and instruction.literal == str(number):
                return instruction.name
        return None

    def source(self, name: str) -> Instruction:
        """Returns the instruction that computes a value, before any copies, conversions and reshapes."""
        instruction = self.instructions[name]
        while instruction.opcode in _FORWARDING:
            instruction = self.instructions[instruction.operands[0]]
        return instruction

    def carried_index(self, instruction: Instruction) -> int | None:
        """Returns which element of the computation's tuple parameter this is; None for any other value."""
        if instruction.opcode != "get-tuple-element" or self.source(instruction.operands[0]).opcode != "parameter":
            return None
        return instruction.tuple_index


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call of a computation, along one path of calls from the entry."""

    computation: Computation
    loops: int  # while loops around it
    runs: int  # in one run of the program; the body of a loop with unknown trip count runs once
    fused: bool  # inside a fusion


type CallCost = Callable[[Call], float]
"""Cost of a call; of a conditional, the branch with the highest cost is the one that counts."""


class _Source(NamedTuple):
    """The instruction that computes a value, and the computation that it is in."""

    computation: Computation
    instruction: Instruction


class HloModule:
    """A parsed program: its computations by name, and the name of its entry, where it starts."""

    def __init__(self, text: str):
        """Parses `compiled.as_text()`; raises ValueError if no computation is marked ENTRY."""
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        # The `while` of each body and condition, and the computation that contains it.
        self._loop_of: dict[str, tuple[Computation, Instruction]] = {}
        match = re.search(r"\bnum_partitions=(\d+)", text[: text.find("\n")])
        # The number of devices in the mesh, or, on several TPU slices, in one slice.
        self.num_partitions = int(match[1]) if match else 1
        current: Computation | None = None
        for line in _logical_lines(text):
            if match := _COMPUTATION.match(line):
                current = self.computations[match["name"]] = Computation(name=match["name"])
                if match["entry"]:
                    self.entry = current.name
            elif current is not None and (match := _INSTRUCTION.match(line)):
                instruction = _parse_instruction(line, match)
                current.instructions[instruction.name] = instruction
                if match["root"]:
                    current.root = instruction.name
                if instruction.opcode == "while":
                    for called in instruction.called_computations:
                        self._loop_of[called] = (current, instruction)
        if not self.entry:
            raise ValueError("not the text of a compiled program: no computation is marked ENTRY")

    def calls(self, cost: CallCost | None = None) -> Iterator[Call]:
        """Yields every call of a computation, once for each path from the entry.

        Of a conditional only the branch with the highest total cost counts; without a cost all branches count.
        """
        entry = Call(computation=self.computations[self.entry], loops=0, runs=1, fused=False)
        return self._calls_from(entry, cost)

    def _calls_from(self, call: Call, cost: CallCost | None) -> Iterator[Call]:
        """Yields a call and all calls inside it."""
        yield call
        for instruction in call.computation.instructions.values():
            if instruction.opcode.endswith(("-done", "-update")):
                continue  # it names the computation that its "-start" calls
            loops, runs = call.loops, call.runs
            if instruction.opcode == "while":
                trip_count = self.trip_count(call.computation, instruction)
                loops, runs = loops + 1, runs * (1 if trip_count is None else trip_count)
            fused = call.fused or instruction.opcode == "fusion"
            callees = [
                Call(computation=self.computations[name], loops=loops, runs=runs, fused=fused)
                for name in instruction.called_computations
                if name in self.computations
            ]
            if instruction.opcode == "conditional" and cost is not None:
                branches = [list(self._calls_from(branch, cost)) for branch in callees]
                yield from max(branches, key=lambda calls: sum(map(cost, calls)))
            else:
                for callee in callees:
                    yield from self._calls_from(callee, cost)

    def unknown_loops(self) -> list[str]:
        """Returns the names of loops with unknown trip counts."""
        return [
            instruction.name
            for call in self.calls()
            for instruction in call.computation.instructions.values()
            if instruction.opcode == "while" and self.trip_count(call.computation, instruction) is None
        ]

    def cycles(self) -> int:
        """Estimates the cycles of one run; of a conditional the longest branch counts."""
        return sum(_cycles(call) for call in self.calls(_cycles))

    def trip_count(self, computation: Computation, loop: Instruction) -> int | None:
        """Returns how often the body of a while loop runs; None if the text does not tell, never a guess.

        If the compiler did not write it down, the loop must be `while i < limit: i += increment` with constants, where
        i is an element of the tuple that the loop carries.
        """
        if loop.trip_count is not None:
            return loop.trip_count
        comparison = self._comparison(self.computations[loop.callees["condition"][0]])
        initial = computation.instructions[loop.operands[0]]
        if comparison is None or initial.opcode != "tuple":
            return None
        index, limit = comparison
        first = self._constant(_Source(computation, computation.source(initial.operands[index])))
        increment = self._increment(self.computations[loop.callees["body"][0]], index)
        if first is None or increment is None or increment <= 0:
            return None
        return max(0, math.ceil((limit - first) / increment))

    def _comparison(self, condition: Computation) -> tuple[int, int] | None:
        """Returns, for the condition `i < limit`, the index of i in the loop's tuple, and the limit."""
        compare, operands = self._look_into_fusion(condition.instructions[condition.root], condition)
        if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
            return None
        counter, limit = operands
        index, value = counter.computation.carried_index(counter.instruction), self._constant(limit)
        return None if index is None or value is None else (index, value)

    def _increment(self, body: Computation, index: int) -> int | None:
        """Returns the constant that a loop adds to its counter, element `index` of its tuple."""
        result = body.instructions[body.root]
        if result.opcode != "tuple":
            return None
        add, operands = self._look_into_fusion(body.source(result.operands[index]), body)
        if add.opcode != "add":
            return None
        for counter, increment in (operands, reversed(operands)):
            if counter.computation.carried_index(counter.instruction) == index:
                return self._constant(increment)
        return None

    def _look_into_fusion(
        self, instruction: Instruction, computation: Computation
    ) -> tuple[Instruction, list[_Source]]:
        """Returns an instruction, or the root of the fusion that it is, and the sources of its operands."""
        if instruction.opcode != "fusion":
            return instruction, [_Source(computation, computation.source(name)) for name in instruction.operands]
        fused = self.computations[instruction.callees["calls"][0]]
        root, sources = fused.instructions[fused.root], []
        for source in map(fused.source, fused.instructions[fused.root].operands):
            if source.opcode == "parameter":  # parameter n of the fusion is its operand n
                outside = computation.source(instruction.operands[int(source.literal)])
                sources.append(_Source(computation, outside))
            else:
                sources.append(_Source(fused, source))
        return root, sources

    def _constant(self, source: _Source) -> int | None:
        """Returns the value of an integer constant, even if enclosing loops carry it unchanged; else None."""
        computation, instruction = source
        if instruction.opcode == "constant":
            return int(instruction.literal) if re.fullmatch(r"-?\d+", instruction.literal) else None
        index = computation.carried_index(instruction)
        if index is None or computation.name not in self._loop_of:
            return None
        # An element of the tuple of the loop around: a constant if the loop starts from one and its body returns it.
        outer, loop = self._loop_of[computation.name]
        initial, body = outer.instructions[loop.operands[0]], self.computations[loop.callees["body"][0]]
        result = body.instructions[body.root]
        if initial.opcode != "tuple" or result.opcode != "tuple":
            return None
        if body.carried_index(body.source(result.operands[index])) != index:
            return None
        return self._constant(_Source(outer, outer.source(initial.operands[index])))


def _cycles(call: Call) -> int:
    if call.fused:
        return 0  # the estimate of a fusion includes its computation
    estimates = (instruction.cycles for instruction in call.computation.instructions.values())
    return call.runs * sum(cycles for cycles in estimates if cycles not in (None, NO_ESTIMATE))


def array_dims(shape: str) -> list[tuple[int, ...]]:
    """Returns the sizes of each array of a shape: those of `(f32[2,8]{1,0}, s32[])` are (2, 8) and ()."""
    return [tuple(int(dim) for dim in dims.split(",") if dim) for _, dims in _ARRAY.findall(_COMMENT.sub("", shape))]


def array_bytes(shape: str) -> tuple[int, ...]:
    """Returns the bytes of each array of a shape: `(f32[2,8]{1,0}, s4[6]{0})` has 64 and 3; a token has none."""
    sizes = []
    for dtype, dims in _ARRAY.findall(_COMMENT.sub("", shape)):
        num_elements = math.prod(int(dim) for dim in dims.split(",") if dim)
        sizes.append(math.ceil(_bits(dtype) / 8 * num_elements))
    return tuple(sizes)


def _bits(dtype: str) -> int:
    """Returns the bits of one element: 8 for `f8e4m3fn`, 4 for `s4`."""
    digits = re.match(r"[a-z]+(\d+)", dtype)
    if digits is None and dtype not in _BITS:
        raise ValueError(f"unknown dtype {dtype} in HLO text; add its bits to _BITS")
    return int(digits[1]) if digits else _BITS[dtype]


def _logical_lines(text: str) -> Iterator[str]:
    """Yields one string per instruction: a line, or several if an attribute in quotes contains line breaks."""
    parts: list[str] = []
    quotes = 0
    for match in re.finditer(r"[^\n]+", text):
        parts.append(match[0])
        quotes += match[0].count('"') - match[0].count('\\"')
        if quotes % 2 == 0:
            yield "\n".join(parts)
            parts.clear()


def _parse_instruction(line: str, match: re.Match[str]) -> Instruction:
    """Parses a line whose start, up to the parenthesis that opens the operands, is `match`."""
    start = end = match.end()
    while True:  # until the parenthesis that closes the operands, which may contain parentheses
        end = line.find(")", end)
        if end < 0 or line.count("(", start, end) == line.count(")", start, end):
            break
        end += 1
    operands, rest = line[start:end], line[end + 1 :]
    # Without the metadata and backend config, which are long, as every instruction is kept.
    attributes = re.split(r", (?:metadata|backend_config)=", rest, maxsplit=1)[0]
    cycles, trip_count = _CYCLES.search(rest), _TRIP_COUNT.search(rest)
    literal = operands if len(operands) < 32 and match["opcode"] in ("constant", "parameter") else ""
    return Instruction(
        name=match["name"],
        opcode=match["opcode"],
        shape=match["shape"],
        operands=() if literal else tuple(re.findall(r"%([\w.-]+)", operands)),
        literal=literal,
        attributes=attributes,
        callees={
            attribute: tuple(names.replace("%", "").replace(" ", "").split(","))
            for attribute, names in _CALLEES.findall(attributes)
        },
        cycles=int(cycles[1]) if cycles else None,
        trip_count=int(trip_count[1]) if trip_count else None,
    )
