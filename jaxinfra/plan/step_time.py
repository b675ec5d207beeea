"""Estimates the time of a compiled train step from its scheduled text: what each part takes, and what waits for what.

A device has units that work at the same time: its cores, the links to other chips (ICI), the network between slices
(DCN), and the link to its host. The text is walked in the order in which the cores run it. An operation of the cores
takes the compiler's own estimate of cycles, or, if it is a kernel of attention, its FLOPs over what such kernels reach.
A transfer begins where the text starts it, and the cores wait for its end where the text asks for its result: a
collective that is not asynchronous is waited for at once.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from jaxinfra.machine.chips import Chip
from jaxinfra.plan.collectives import Collective, CollectiveFinder
from jaxinfra.plan.hlo import NO_ESTIMATE, Call, Computation, HloModule, Instruction, array_dims
from jaxinfra.plan.roofline import Roofline

type Cause = Literal["matmuls", "HBM", "attention", "ICI", "DCN", "host"]

CORES: tuple[Cause, ...] = ("matmuls", "HBM", "attention")
"""Work of the cores; the other causes are transfers."""

_HOST_SPACE = "S(5)"  # in a layout: memory of the host
_GROUPED = "ragged-dot-none"  # the compiler's kernel of matmuls of experts
_GROUPED_PART = 0.7  # of the peak, as the compiler's estimate of a large matmul on v6e
_KERNEL_PASSES = {"fwd": 2, "dkv": 4, "dq": 3, "bwd": 5}  # matmuls of the scores' size in each kernel


@dataclass(frozen=True, kw_only=True)
class Rates:
    """The rates that units reach in practice, fitted to published step times (docs/plan.md)."""

    compute: float = 1.0  # time of operations, as a multiple of the compiler's estimate
    attention: float = 0.5  # FLOP/s of attention kernels, as a part of the peak, for heads that fill a matrix unit
    links: float = 0.8  # bandwidth of collectives, as a part of that of the links
    host_bytes_per_s: float = 50e9  # between a device and its host, in each direction


@dataclass(frozen=True, kw_only=True)
class Attention:
    """The work of attention in one step on one device."""

    matmul_flops: float  # of one matmul of queries and keys, over all layers
    peak_flops: float
    fused_backward: bool = False  # whether one kernel makes all gradients, with 5 matmuls in place of 7


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Seconds by cause: what units do, and for what the cores wait."""

    work: Mapping[Cause, float]
    waits: Mapping[Cause, float]

    @property
    def cores_s(self) -> float:
        """Time in which the cores work."""
        return sum(self.work.get(cause, 0.0) for cause in CORES)

    @property
    def estimate_s(self) -> float:
        """Time of a step as the text has it."""
        return self.cores_s + sum(self.waits.values())

    @property
    def lower_s(self) -> float:
        """Time of a step in which nothing waits: that of the unit with the most work."""
        return max(self.cores_s, *(seconds for cause, seconds in self.work.items() if cause not in CORES), 0.0)

    @property
    def upper_s(self) -> float:
        """Time of a step in which nothing overlaps."""
        return sum(self.work.values())

    def times(self, factor: float) -> "Spent":
        """Returns the same, that often."""
        return Spent(
            work={cause: factor * seconds for cause, seconds in self.work.items()},
            waits={cause: factor * seconds for cause, seconds in self.waits.items()},
        )


@dataclass
class _Clock:
    """The time while a computation is walked."""

    now_s: float = 0.0
    free_s: dict[str, float] = field(default_factory=dict)  # when a link has done its transfers
    work: dict[Cause, float] = field(default_factory=dict)
    waits: dict[Cause, float] = field(default_factory=dict)
    pending: dict[str, tuple[Cause, float]] = field(default_factory=dict)  # ends of transfers

    def compute(self, cause: Cause, seconds: float) -> None:
        _add(self.work, cause, seconds)
        self.now_s += seconds

    def start(self, cause: Cause, seconds: float, link: str = "") -> float:
        """Starts a transfer behind those of its link; returns when it ends."""
        link = link or cause
        begin_s = max(self.now_s, self.free_s.get(link, 0.0))
        self.free_s[link] = begin_s + seconds
        _add(self.work, cause, seconds)
        return begin_s + seconds

    def wait(self, cause: Cause, end_s: float) -> None:
        if end_s > self.now_s:
            _add(self.waits, cause, end_s - self.now_s)
            self.now_s = end_s

    def add(self, spent: Spent) -> None:
        """Adds what a computation that was called has spent."""
        for cause, seconds in spent.work.items():
            _add(self.work, cause, seconds)
        for cause, seconds in spent.waits.items():
            _add(self.waits, cause, seconds)
        self.now_s += spent.estimate_s


def _add(sums: dict[Cause, float], cause: Cause, seconds: float) -> None:
    sums[cause] = sums.get(cause, 0.0) + seconds


class StepTimer:
    """Walks one compiled program."""

    def __init__(
        self,
        module: HloModule,
        finder: CollectiveFinder,
        chip: Chip,
        coords: np.ndarray,
        wrap: Sequence[bool],
        rates: Rates,
        attention: Attention | None,
        slices: int = 1,
    ):
        """`coords` are those of the chip of each device, `[devices, dims]`, and `wrap` says which dims are rings.

        Of GPUs they are the numbers of their hosts.
        """
        self._module, self._finder, self._chip, self._rates = module, finder, chip, rates
        self._coords, self._wrap, self._attention, self._slices = coords, wrap, attention, slices
        self._extent = coords.max(0) + 1
        self._roofline = Roofline(module.computations, chip)
        self._spent: dict[str, Spent] = {}
        self._seconds_of_pass = self._attention_pass_s()

    def run(self) -> Spent:
        """Returns what a step spends."""
        return self._run(self._module.computations[self._module.entry])

    def _attention_pass_s(self) -> float:
        """Returns the seconds of one run of a forward kernel for each of its two matmuls."""
        runs = Counter[str]()
        for call in self._module.calls():
            for instruction in call.computation.instructions.values():
                if (kind := _attention_kernel(instruction)) is not None:
                    runs[kind] += call.runs
        if self._attention is None or not runs:
            return 0.0
        once = max(runs["dkv"], runs["dq"], runs["bwd"]) or runs["fwd"]  # backward kernels run once a step and block
        return self._attention.matmul_flops / once / (self._attention.peak_flops * self._rates.attention)

    def _run(self, computation: Computation) -> Spent:
        if computation.name not in self._spent:
            self._spent[computation.name] = self._walk(computation)
        return self._spent[computation.name]

    def _walk(self, computation: Computation) -> Spent:
        clock = _Clock()
        found: dict[str, list[Collective]] = {}
        for each in self._collectives(computation):
            found.setdefault(each.instruction, []).append(each)
        for instruction in computation.instructions.values():
            self._step(clock, computation, instruction, found.get(instruction.name, []))
        return Spent(work=clock.work, waits=clock.waits)

    def _step(
        self, clock: _Clock, computation: Computation, instruction: Instruction, found: Sequence[Collective]
    ) -> None:
        opcode, named = instruction.opcode, self._module.computations
        if opcode.endswith("-done"):
            started = clock.pending.pop(self._start_of(computation, instruction), None)
            if started is not None:
                clock.wait(*started)
        elif found:
            cause: Cause = "DCN" if found[0].link == "network" else "ICI"
            end_s = clock.start(cause, sum(map(self.collective_s, found)))
            if opcode.endswith("-start") or opcode == "send":
                clock.pending[instruction.name] = (cause, end_s)
            else:
                clock.wait(cause, end_s)
        elif opcode.endswith("-start"):
            self._start(clock, computation, instruction)
        elif opcode == "while":
            trips = self._module.trip_count(computation, instruction)
            clock.add(self._run(named[instruction.callees["body"][0]]).times(1 if trips is None else trips))
        elif opcode == "conditional":
            branches = [self._run(named[name]) for name in instruction.called_computations if name in named]
            clock.add(max(branches, key=lambda spent: spent.estimate_s))
        elif opcode == "call":
            for name in instruction.called_computations:
                clock.add(self._run(named[name]))
        elif (kind := _attention_kernel(instruction)) is not None:
            fused = self._attention is not None and self._attention.fused_backward and kind in ("dkv", "dq")
            clock.compute("attention", _KERNEL_PASSES[kind] * (5 / 7 if fused else 1) * self._seconds_of_pass)
        elif opcode == "custom-call" and instruction.name.startswith(_GROUPED):
            flops = _grouped_flops(computation, instruction)
            clock.compute("matmuls", flops / (_GROUPED_PART * self._chip.peak_flops) * self._rates.compute)
        else:
            self._operate(clock, computation, instruction)

    def _operate(self, clock: _Clock, computation: Computation, instruction: Instruction) -> None:
        """Runs an operation of the cores; a collective that is fused with it moves meanwhile, and is waited for."""
        fused = [
            each
            for name in instruction.called_computations
            if instruction.opcode == "fusion" and name in self._module.computations
            for each in self._collectives(self._module.computations[name], fused=True)
        ]
        cause: Cause = "DCN" if any(each.link == "network" for each in fused) else "ICI"
        end_s = clock.start(cause, sum(map(self.collective_s, fused))) if fused else 0.0
        if (seconds := self._operation_s(computation, instruction)) > 0:
            clock.compute("matmuls" if self._has_matmul(computation, instruction) else "HBM", seconds)
        clock.wait(cause, end_s)

    def _operation_s(self, computation: Computation, instruction: Instruction) -> float:
        """Returns the time of an operation: the compiler's cycles, or for a chip without them from FLOPs and bytes."""
        if self._chip.clock_hz is None:
            return self._roofline.seconds(computation, instruction)
        cycles = 0 if instruction.cycles in (None, NO_ESTIMATE) else instruction.cycles or 0
        return cycles * self._rates.compute / self._chip.clock_hz

    def _collectives(self, computation: Computation, *, fused: bool = False) -> list[Collective]:
        return list(self._finder.find(Call(computation=computation, loops=0, runs=1, fused=fused)))

    def _start(self, clock: _Clock, computation: Computation, instruction: Instruction) -> None:
        """Starts what runs beside the cores: copies to or from the host, and what is called elsewhere."""
        if _HOST_SPACE in instruction.shape:
            seconds = _moved_bytes(computation, instruction) / self._rates.host_bytes_per_s
            end_s = clock.start("host", seconds, link="to host" if _is_to_host(instruction) else "from host")
            clock.pending[instruction.name] = ("host", end_s)
        for name in instruction.called_computations:
            callee = self._module.computations.get(name)
            if callee is None:
                continue
            if seconds := sum(map(self.collective_s, self._collectives(callee))):
                clock.pending[instruction.name] = ("ICI", clock.start("ICI", seconds))

    def _start_of(self, computation: Computation, instruction: Instruction) -> str:
        while instruction.opcode.endswith(("-done", "-update")) and instruction.operands:
            instruction = computation.instructions[instruction.operands[0]]
        return instruction.name

    def _has_matmul(self, computation: Computation, instruction: Instruction) -> bool:
        if instruction.opcode in ("convolution", "dot") or self._roofline.flops(computation, instruction) > 0:
            return True
        called = (self._module.computations.get(name) for name in instruction.called_computations)
        return any(self._has_matmul(inner, each) for inner in called if inner for each in inner.instructions.values())

    def collective_s(self, collective: Collective) -> float:
        """Returns the seconds of a collective that has its links for itself."""
        moved, kind, size = sum(collective.array_bytes), collective.kind, max(len(collective.group), 1)
        link_bytes_per_s = (self._chip.link_bytes_per_s or np.inf) * self._rates.links
        network_bytes_per_s = (self._chip.network_bytes_per_s or np.inf) * self._rates.links
        twice = 2 if kind.startswith("all-reduce") else 1
        if self._chip.platform == "cuda":
            hosts = len(set(self._coords[list(collective.group), 0])) or 1
            per_host = max(size // hosts, 1)
            if kind == "collective-permute":  # its group is one pair of many
                return moved / (network_bytes_per_s if collective.link == "network" else link_bytes_per_s)
            # What crosses hosts is shared out over the GPUs of each, unless every GPU sends its own.
            shared = 1 if "all-to-all" in kind else per_host
            across_s = (hosts - 1) / hosts * moved / (shared * network_bytes_per_s)
            return twice * max(across_s, (size - 1) / size * moved / link_bytes_per_s)
        if collective.link == "network":
            return twice * (self._slices - 1) / self._slices * moved / network_bytes_per_s
        if size == 1 or not moved:
            return 0.0
        per_chip = self._chip.devices_per_chip
        coords = self._coords[list(collective.group)]
        spans = [len(set(coords[:, dim])) for dim in range(coords.shape[1])]
        rings = [bool(self._wrap[dim]) and span == self._extent[dim] for dim, span in enumerate(spans)]
        if kind == "collective-permute":
            return moved / link_bytes_per_s
        if "all-to-all" in kind:  # half of what is sent crosses the middle of the longest dimension
            span, ring = max(zip(spans, rings, strict=True))
            return moved * span * per_chip / ((8 if ring else 4) * link_bytes_per_s)
        links = sum(2 if ring else 1 for span, ring in zip(spans, rings, strict=True) if span > 1) or np.inf
        return twice * (size - 1) / size * moved * per_chip / (links * link_bytes_per_s)


def _is_to_host(instruction: Instruction) -> bool:
    """Whether a copy ends on the host; the first array in the shape of its start is the destination."""
    if instruction.opcode.startswith("dynamic-"):
        return instruction.opcode.startswith("dynamic-update-slice")
    destination = re.match(r"\(*\w+\[[\d,]*\](\{[^}]*\})?", instruction.shape)
    return destination is not None and _HOST_SPACE in destination[0]


def _moved_bytes(computation: Computation, instruction: Instruction) -> float:
    """Returns the bytes of a copy; of an update of a slice, those of the slice."""
    if instruction.opcode.startswith("dynamic-update-slice"):
        return sum(computation.instructions[instruction.operands[1]].array_bytes)
    done = next((user for user in computation.users.get(instruction.name, ()) if user.opcode.endswith("-done")), None)
    return sum(done.array_bytes) if done else 0.0


def _grouped_flops(computation: Computation, instruction: Instruction) -> float:
    """Returns the FLOPs of a grouped matmul: rows [M, K] by matrices [E, K, N], or the gradient of these."""
    operands = [array_dims(computation.instructions[name].shape) for name in instruction.operands]
    (out,) = array_dims(instruction.shape)
    arrays = [dims[0] for dims in operands if len(dims) == 1]
    rows = next(dims for dims in arrays if len(dims) == 2)
    if len(out) == 3:  # [E, K, N], of rows of K and of N
        return 2.0 * rows[0] * out[1] * out[2]
    return 2.0 * out[0] * out[1] * rows[1]


def _attention_kernel(instruction: Instruction) -> str | None:
    """Returns which kernel of attention an instruction calls: fwd, dkv, dq or bwd; None for anything else."""
    target = instruction.quoted("custom_call_target") if instruction.opcode == "custom-call" else None
    if target is not None and target.startswith("__cudnn$fmha"):
        return "bwd" if "Backward" in target else "fwd"
    match = re.match(r"splash_\w*?_(fwd|dkv|dq)_", instruction.name) if target == "tpu_custom_call" else None
    return match[1] if match else None
