"""Parses the text of a compiled XLA program (scheduled HLO) and follows which computation runs how often.

The trip count of a loop is computed from its condition, the counter's first value and its increment. If one of them
cannot be found, the trip count is None, never a guess.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

NO_ESTIMATE = 2**63 - 1
"""Cycles that the TPU compiler writes for an instruction that it cannot estimate."""

_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$", re.DOTALL)
_INSTRUCTION = re.compile(
    r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.-]+) = (?P<shape>.*?) ?\b(?P<opcode>[a-z][a-z0-9-]*)\(", re.DOTALL
)
_CALLEES = re.compile(r"\b(\w+)=\{?(%[\w.-]+(?:, ?%[\w.-]+)*)")
_ARRAY = re.compile(r"\b([a-z]+[0-9]*(?:e\d+m\d+\w*)?)\[([0-9,]*)\]")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_BITS = {"pred": 8, "token": 0}  # the other formats end with their number of bits
# Opcodes that return the values of their first operand.
_FORWARDING = ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "optimization-barrier")


@dataclass(frozen=True, kw_only=True, slots=True)
class Instruction:
    """One HLO instruction."""

    name: str
    opcode: str
    shape: str  # of its result, such as `f32[2,8]{1,0}`
    operands: tuple[str, ...]  # names of instructions; none for a constant or a parameter
    literal: str  # the text in the parentheses of a short constant or a parameter
    attributes: str  # the text after the operands, up to metadata and backend config
    callees: dict[str, tuple[str, ...]]  # attribute to the names of the computations that it calls
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

    def string(self, attribute: str) -> str | None:
        """Returns the value of a quoted attribute."""
        match = re.search(rf'\b{attribute}="([^"]*)"', self.attributes)
        return match[1] if match else None


@dataclass(kw_only=True)
class Computation:
    """Instructions by name, in the order of execution; the result of `root` is returned."""

    name: str
    root: str = ""
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
        """Returns the name of a parameter."""
        names = (i.name for i in self.instructions.values() if i.opcode == "parameter" and i.literal == str(number))
        return next(names, None)

    def source(self, name: str) -> Instruction:
        """Returns the instruction that computes a value, behind copies, conversions and reshapes."""
        instruction = self.instructions[name]
        while instruction.opcode in _FORWARDING:
            instruction = self.instructions[instruction.operands[0]]
        return instruction


@dataclass(frozen=True, kw_only=True)
class Call:
    """A computation that is called along one path from the entry."""

    computation: Computation
    loops: int  # while loops around it
    runs: int  # in one run of the program; the body of a loop with unknown trip count runs once
    fused: bool  # inside a fusion


type CallCost = Callable[[Call], float]
"""Cost of a call; of a conditional, the branch with the highest cost is the one that counts."""


class HloModule:
    """A parsed program: its computations by name, and the name of the one that it starts with."""

    def __init__(self, text: str):
        """Parses `compiled.as_text()`; raises ValueError if no computation is marked ENTRY."""
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        match = re.search(r"\bnum_partitions=(\d+)", text[: text.find("\n")])
        # The number of devices in the mesh, or, on several TPU slices, in one slice.
        self.num_partitions = int(match[1]) if match else 1
        current: Computation | None = None
        for line in _logical_lines(text):
            if header := _COMPUTATION.match(line):
                current = self.computations[header["name"]] = Computation(name=header["name"])
                self.entry = current.name if header["entry"] else self.entry
            elif current is not None and (match := _INSTRUCTION.match(line)):
                current.instructions[match["name"]] = _parse_instruction(line, match)
                current.root = match["name"] if match["root"] else current.root
        if not self.entry:
            raise ValueError("not the text of a compiled program: no computation is marked ENTRY")
        # The loop that a computation is the body or the condition of, and the computation that contains the loop.
        self._loop_of = {
            name: (computation, instruction)
            for computation in self.computations.values()
            for instruction in computation.instructions.values()
            if instruction.opcode == "while"
            for attribute in ("body", "condition")
            for name in instruction.callees[attribute]
        }

    def calls(self, cost: CallCost | None = None) -> Iterator[Call]:
        """Yields every call of a computation, once for each path from the entry.

        Of a conditional only the branch with the highest total cost counts; without a cost all branches count.
        """
        return self._calls(self.entry, 0, 1, False, cost)

    def _calls(self, name: str, loops: int, runs: int, fused: bool, cost: CallCost | None) -> Iterator[Call]:
        computation = self.computations[name]
        yield Call(computation=computation, loops=loops, runs=runs, fused=fused)
        for instruction in computation.instructions.values():
            inside = fused or instruction.opcode == "fusion"
            if instruction.opcode == "while":
                runs_inside = runs * self._loop_runs(computation, instruction)
                for called in instruction.called_computations:
                    yield from self._calls(called, loops + 1, runs_inside, inside, cost)
            elif instruction.opcode == "conditional" and cost is not None:
                called = instruction.called_computations
                branches = [list(self._calls(branch, loops, runs, inside, cost)) for branch in called]
                yield from max(branches, key=lambda calls: sum(map(cost, calls)))
            elif not instruction.opcode.endswith(("-done", "-update")):  # these repeat the call of their "-start"
                for called in instruction.called_computations:
                    if called in self.computations:
                        yield from self._calls(called, loops, runs, inside, cost)

    def unknown_loops(self) -> list[str]:
        """Returns the names of loops with unknown trip counts."""
        return [
            instruction.name
            for call in self.calls()
            for instruction in call.computation.instructions.values()
            if instruction.opcode == "while" and self.trip_count(call.computation, instruction) is None
        ]

    def cycles(self, name: str | None = None) -> int:
        """Estimates the cycles of one run of a computation (None: the entry).

        Cycles in loops are multiplied by their trip counts. Of a conditional the longest branch counts.
        """
        computation, total = self.computations[name or self.entry], 0
        for instruction in computation.instructions.values():
            total += instruction.cycles if instruction.cycles not in (None, NO_ESTIMATE) else 0
            if instruction.opcode == "while":
                (body,) = instruction.callees["body"]
                total += self.cycles(body) * self._loop_runs(computation, instruction)
            elif instruction.opcode == "conditional":
                total += max(map(self.cycles, instruction.called_computations))
            elif instruction.opcode in ("call", "async-start"):
                total += sum(map(self.cycles, instruction.called_computations))
        return total

    def _loop_runs(self, computation: Computation, loop: Instruction) -> int:
        """Returns the trip count, or 1 if it is unknown."""
        trip_count = self.trip_count(computation, loop)
        return 1 if trip_count is None else trip_count

    def trip_count(self, computation: Computation, loop: Instruction) -> int | None:
        """Returns how often the body of a while loop runs; None if the text does not tell."""
        if loop.trip_count is not None:
            return loop.trip_count
        condition = self.computations[loop.callees["condition"][0]]
        body = self.computations[loop.callees["body"][0]]
        # The loop is `while i < limit: i += increment`; i is an element of the tuple that the loop carries.
        comparison = self._comparison(condition)
        initial = computation.instructions[loop.operands[0]]
        if comparison is None or initial.opcode != "tuple":
            return None
        index, limit = comparison
        first, increment = self._constant(computation, initial.operands[index]), self._increment(body, index)
        if first is None or increment is None or increment <= 0:
            return None
        return max(0, math.ceil((limit - first) / increment))

    def _comparison(self, condition: Computation) -> tuple[int, int] | None:
        """Returns the counter's index in the loop's tuple and the limit that it stays below."""
        root = condition.instructions[condition.root]
        compare, scope = self._fused_root(root, condition)
        if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
            return None
        counter, limit = (scope.source(name) for name in compare.operands)
        if scope is not condition:
            # The parameters of the fusion stand for its operands in the condition.
            counter, limit = (
                condition.source(root.operands[int(each.literal)]) if each.opcode == "parameter" else each
                for each in (counter, limit)
            )
        value = self._constant(condition if limit.name in condition.instructions else scope, limit.name)
        return None if counter.tuple_index is None or value is None else (counter.tuple_index, value)

    def _increment(self, body: Computation, index: int) -> int | None:
        """Returns the constant that a loop adds to its counter."""
        root = body.instructions[body.root]
        next_value = body.source(root.operands[index]) if root.opcode == "tuple" else root
        add, scope = self._fused_root(next_value, body)
        if add.opcode != "add":
            return None
        constants = [value for name in add.operands if (value := self._constant(scope, name)) is not None]
        return constants[0] if len(constants) == 1 else None

    def _fused_root(self, instruction: Instruction, scope: Computation) -> tuple[Instruction, Computation]:
        """Returns the root of a fusion and the fused computation; other instructions are returned with `scope`."""
        if instruction.opcode != "fusion":
            return instruction, scope
        fused = self.computations[instruction.callees["calls"][0]]
        return fused.instructions[fused.root], fused

    def _constant(self, computation: Computation, name: str) -> int | None:
        """Returns the value of an integer constant, also if loops pass it on unchanged; None for anything else."""
        source = computation.source(name)
        if source.opcode == "constant":
            return int(source.literal) if re.fullmatch(r"-?\d+", source.literal) else None
        index = source.tuple_index
        if index is None or computation.name not in self._loop_of:
            return None
        outer, loop = self._loop_of[computation.name]
        initial, body = outer.instructions[loop.operands[0]], self.computations[loop.callees["body"][0]]
        result = body.instructions[body.root]
        if initial.opcode != "tuple" or result.opcode != "tuple":
            return None
        unchanged = body.source(result.operands[index]).tuple_index == index
        return self._constant(outer, initial.operands[index]) if unchanged else None


def array_bytes(shape: str) -> tuple[int, ...]:
    """Returns the bytes of each array of a shape such as `f32[2,8]{1,0}` or a tuple of shapes; a token has none."""
    arrays = _ARRAY.findall(re.sub(r"/\*.*?\*/", "", shape))
    return tuple(
        math.ceil(_bits(dtype) / 8 * math.prod(map(int, dims.split(",")) if dims else ())) for dtype, dims in arrays
    )


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
    start = end = match.end()
    while True:  # finds the parenthesis that closes the operands, as operands may contain parentheses
        end = line.find(")", end)
        if end < 0 or line.count("(", start, end) == line.count(")", start, end):
            break
        end += 1
    operands, rest = line[start:end], line[end + 1 :]
    # Metadata and backend configs are long; without them the text can be freed.
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
