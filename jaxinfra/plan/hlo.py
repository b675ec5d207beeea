"""Reads a compiled program's text (scheduled HLO) into computations, and follows what runs how often.

Not for what a text means: `collectives` and `compiled` judge that. A loop's trip count is worked out from its
condition, its first value and its step, through whatever the compiler put in between; where that fails it is None,
never a guess. The text may be let go once it is read: nothing here keeps its long attributes.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

_BITS = {"pred": 8, "token": 0}  # of an element where the name of its format has no digits

NO_ESTIMATE = 2**63 - 1
"""What the TPU compiler writes for the cycles of an instruction that it cannot estimate."""

_HEADER = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$", re.DOTALL)
_INSTRUCTION = re.compile(
    r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.-]+) = (?P<type>.*?) ?\b(?P<kind>[a-z][a-z0-9-]*)\(", re.DOTALL
)
_CALLS = re.compile(r"\b(\w+)=\{?(%[\w.-]+(?:, ?%[\w.-]+)*)")
_ARRAY = re.compile(r"\b([a-z]+[0-9]*(?:e\d+m\d+\w*)?)\[([0-9,]*)\]")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_PASSED_ON = ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "optimization-barrier")
"""Kinds that yield their first operand: where a value is followed, they are looked through."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Instruction:
    """One instruction.

    Attributes:
        name: unique in its computation.
        kind: the operation, such as "fusion".
        type: of what it yields.
        operands: names; of a constant or a parameter nothing.
        literal: what stands in the parentheses of a short constant or a parameter.
        attributes: what follows the operands, up to metadata and backend configuration.
        calls: attribute to names of computations.
        cycles: the compiler's estimate; None without one.
        trips: how often a loop runs, where the compiler wrote it down.
    """

    name: str
    kind: str
    type: str
    operands: tuple[str, ...]
    literal: str
    attributes: str
    calls: dict[str, tuple[str, ...]]
    cycles: int | None
    trips: int | None

    @property
    def arrays(self) -> tuple[int, ...]:
        """Bytes of the arrays that it yields."""
        return array_bytes(self.type)

    @property
    def index(self) -> int | None:
        """Which element a `get-tuple-element` yields; None of every other kind."""
        found = re.search(r"\bindex=(\d+)", self.attributes) if self.kind == "get-tuple-element" else None
        return int(found[1]) if found else None

    def text(self, attribute: str) -> str | None:
        """The text of a quoted attribute."""
        found = re.search(rf'\b{attribute}="([^"]*)"', self.attributes)
        return found[1] if found else None


@dataclass(kw_only=True)
class Computation:
    """Instructions in the order in which they are scheduled, by name; `root` is the one that it yields."""

    name: str
    root: str = ""
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Who takes each instruction as an operand."""
        found: dict[str, list[Instruction]] = {}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                found.setdefault(operand, []).append(instruction)
        return found

    def parameter(self, number: int) -> str | None:
        """The name of a parameter."""
        found = (i.name for i in self.instructions.values() if i.kind == "parameter" and i.literal == str(number))
        return next(found, None)


@dataclass(frozen=True, kw_only=True)
class Place:
    """A computation at one place where it runs.

    Attributes:
        computation: what runs.
        loops: while loops around it.
        times: how often it runs in one run of the program; a loop of unknown length counts once.
        fused: whether it is the inside of a fusion.
    """

    computation: Computation
    loops: int
    times: int
    fused: bool


type Weight = Callable[[Place], float]
"""What a place counts for, where one branch of several runs."""


class Module:
    """A program that has been read.

    Attributes:
        computations: by name.
        entry: where it starts.
        partitions: devices that it is for; of several TPU slices those of one.
    """

    def __init__(self, text: str):
        """Reads `compiled.as_text()`; a ValueError where it is no text of a compiled program."""
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        found = re.search(r"\bnum_partitions=(\d+)", text[: text.find("\n")])
        self.partitions = int(found[1]) if found else 1
        current: Computation | None = None
        for line in _logical_lines(text):
            if header := _HEADER.match(line):
                current = self.computations[header["name"]] = Computation(name=header["name"])
                self.entry = current.name if header["entry"] else self.entry
            elif current is not None and (matched := _INSTRUCTION.match(line)):
                current.instructions[matched["name"]] = _instruction(line, matched)
                current.root = matched["name"] if matched["root"] else current.root
        if not self.entry:
            raise ValueError("not the text of a compiled program: no computation is marked ENTRY")
        self._loops = {
            name: (computation, instruction)
            for computation in self.computations.values()
            for instruction in computation.instructions.values()
            if instruction.kind == "while"
            for attribute in ("body", "condition")
            for name in instruction.calls[attribute]
        }

    def executed(self, weight: Weight | None = None) -> Iterator[Place]:
        """Every computation that runs, once for each way from the entry to it.

        Of a choice the branch that weighs most counts; without a weight all of them do.
        """
        return self._visit(self.entry, 0, 1, False, weight)

    def _visit(self, name: str, loops: int, times: int, fused: bool, weight: Weight | None) -> Iterator[Place]:
        computation = self.computations[name]
        yield Place(computation=computation, loops=loops, times=times, fused=fused)
        for instruction in computation.instructions.values():
            inside = fused or instruction.kind == "fusion"
            if instruction.kind == "while":
                times_inside = times * self._runs(computation, instruction)
                for called in _called(instruction):
                    yield from self._visit(called, loops + 1, times_inside, inside, weight)
            elif instruction.kind == "conditional" and weight is not None:
                branches = [list(self._visit(b, loops, times, inside, weight)) for b in _called(instruction)]
                yield from max(branches, key=lambda places: sum(map(weight, places)))
            elif not instruction.kind.endswith(("-done", "-update")):  # these name what their start has called
                for called in _called(instruction):
                    if called in self.computations:
                        yield from self._visit(called, loops, times, inside, weight)

    def unknown_loops(self) -> list[str]:
        """The loops whose length cannot be worked out."""
        return [
            instruction.name
            for place in self.executed()
            for instruction in place.computation.instructions.values()
            if instruction.kind == "while" and self.trips(place.computation, instruction) is None
        ]

    def cycles(self, name: str | None = None) -> int:
        """Estimated cycles of one run of a computation, None is the whole program, loops multiplied out.

        Of a choice the longest branch counts.
        """
        computation, total = self.computations[name or self.entry], 0
        for instruction in computation.instructions.values():
            total += instruction.cycles if instruction.cycles not in (None, NO_ESTIMATE) else 0
            if instruction.kind == "while":
                (body,) = instruction.calls["body"]
                total += self.cycles(body) * self._runs(computation, instruction)
            elif instruction.kind == "conditional":
                total += max(self.cycles(branch) for branch in _called(instruction))
            elif instruction.kind in ("call", "async-start"):
                total += sum(self.cycles(called) for called in _called(instruction))
        return total

    def _runs(self, computation: Computation, loop: Instruction) -> int:
        """How often a while loop's body counts."""
        trips = self.trips(computation, loop)
        return 1 if trips is None else trips

    def trips(self, computation: Computation, loop: Instruction) -> int | None:
        """How often a while loop's body runs, None where the text does not say."""
        if loop.trips is not None:
            return loop.trips
        condition = self.computations[loop.calls["condition"][0]]
        body = self.computations[loop.calls["body"][0]]
        if (compared := self._comparison(condition)) is None:
            return None
        index, limit = compared
        carried = computation.instructions[loop.operands[0]]
        first = self._constant(computation, carried.operands[index]) if carried.kind == "tuple" else None
        step = self._step(body, index)
        if first is None or step is None or step <= 0:
            return None
        return max(0, math.ceil((limit - first) / step))

    def _comparison(self, condition: Computation) -> tuple[int, int] | None:
        """Place of the counter in what a loop carries, and the number that it stays below."""
        root, inside, operands = condition.instructions[condition.root], condition, None
        if root.kind == "fusion":
            inside, operands = self.computations[root.calls["calls"][0]], root.operands
            root = inside.instructions[inside.root]
        if root.kind != "compare" or "direction=LT" not in root.attributes:
            return None
        counter, limit = (_source(inside, name) for name in root.operands)
        if operands is not None:  # parameters of the fusion stand for its operands
            counter, limit = (
                _source(condition, operands[int(each.literal)]) if each.kind == "parameter" else each
                for each in (counter, limit)
            )
        value = int(limit.literal) if limit.literal.isdecimal() and limit.kind == "constant" else None
        if value is None and limit.name in condition.instructions:
            value = self._constant(condition, limit.name)
        return None if counter.index is None or value is None else (counter.index, value)

    def _constant(self, computation: Computation, name: str) -> int | None:
        """The number that an instruction yields, if it is one, also where loops carry it unchanged."""
        source = _source(computation, name)
        if source.kind == "constant":
            return int(source.literal) if re.fullmatch(r"-?\d+", source.literal) else None
        index = source.index
        if index is None or computation.name not in self._loops:
            return None
        outer, loop = self._loops[computation.name]
        carried, body = outer.instructions[loop.operands[0]], self.computations[loop.calls["body"][0]]
        after = body.instructions[body.root]
        if carried.kind != "tuple" or after.kind != "tuple":
            return None
        unchanged = _source(body, after.operands[index]).index == index
        return self._constant(outer, carried.operands[index]) if unchanged else None

    def _step(self, body: Computation, index: int) -> int | None:
        """What a loop adds to its counter."""
        after = body.instructions[body.root]
        added = _source(body, after.operands[index]) if after.kind == "tuple" else after
        if added.kind == "fusion":
            inside = self.computations[added.calls["calls"][0]]
            added, body = inside.instructions[inside.root], inside
        if added.kind != "add":
            return None
        steps = [step for name in added.operands if (step := self._constant(body, name)) is not None]
        return steps[0] if len(steps) == 1 else None


def array_bytes(shape: str) -> tuple[int, ...]:
    """Bytes of the arrays of a type: `f32[2,8]{1,0}`, or several in parentheses. Tokens are none."""
    shapes = _ARRAY.findall(re.sub(r"/\*.*?\*/", "", shape))
    return tuple(
        math.ceil(_bits(dtype) / 8 * math.prod(map(int, dims.split(",")) if dims else ())) for dtype, dims in shapes
    )


def _bits(dtype: str) -> int:
    """Bits of one element: `f8e4m3fn` has eight, `s4` four."""
    digits = re.match(r"[a-z]+(\d+)", dtype)
    if digits is None and dtype not in _BITS:
        raise ValueError(f"{dtype}: a number format that is not known here")
    return int(digits[1]) if digits else _BITS[dtype]


def _source(computation: Computation, name: str) -> Instruction:
    """The instruction that a value comes from, behind copies and changes of its form."""
    instruction = computation.instructions[name]
    while instruction.kind in _PASSED_ON:
        instruction = computation.instructions[instruction.operands[0]]
    return instruction


def _called(instruction: Instruction) -> tuple[str, ...]:
    return tuple(name for names in instruction.calls.values() for name in names)


def _logical_lines(text: str) -> Iterator[str]:
    """The lines, one an instruction: quoted attributes of kernels may hold line breaks."""
    start, size = 0, len(text)
    held: list[str] = []
    while start < size:
        end = text.find("\n", start)
        end = size if end < 0 else end
        line = text[start:end]
        start = end + 1
        quotes = line.count('"') - line.count('\\"')
        if not held and quotes % 2 == 0:
            yield line
        elif held and quotes % 2:
            yield "\n".join([*held, line])
            held.clear()
        else:
            held.append(line)


def _instruction(line: str, matched: re.Match[str]) -> Instruction:
    start = end = matched.end()
    while True:  # to the parenthesis that closes the operands
        end = line.find(")", end)
        if end < 0 or line.count("(", start, end) == line.count(")", start, end):
            break
        end += 1
    inside, rest = line[start:end], line[end + 1 :]
    kept = re.split(r", (?:metadata|backend_config)=", rest, maxsplit=1)[0]
    cycles, trips = _CYCLES.search(rest), _TRIPS.search(rest)
    literal = inside if len(inside) < 32 and matched["kind"] in ("constant", "parameter") else ""
    return Instruction(
        name=matched["name"],
        kind=matched["kind"],
        type=matched["type"],
        operands=() if literal else tuple(re.findall(r"%([\w.-]+)", inside)),
        literal=literal,
        attributes=kept,
        calls={key: tuple(names.replace("%", "").replace(" ", "").split(",")) for key, names in _CALLS.findall(kept)},
        cycles=int(cycles[1]) if cycles else None,
        trips=int(trips[1]) if trips else None,
    )
