"""The train step of a run, compiled ahead of time for described hardware, and what the compiler says of it.

It is the step that `Program` trains with, not a model of it: memory is what the compiler allots, collectives and
cycles are read from the text of what would run. Not in the cycles: collectives, and kernels written in Pallas.
"""

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from jaxinfra.config import validate
from jaxinfra.errors import ConfigError
from jaxinfra.parallel.mesh import make_mesh
from jaxinfra.plan.collectives import Traffic, collectives, summed
from jaxinfra.plan.hlo import NO_ESTIMATE, Module, Place
from jaxinfra.plan.refusal import explained, too_big
from jaxinfra.plan.topology import Topology, devices, domains, prepare
from jaxinfra.program import Program
from jaxinfra.run import Run, resolved
from jaxinfra.train.derived import per_device_bytes

_OF_THE_COMPILER = re.compile(r"[A-Z][A-Za-z]*|annotate_device_placement")
"""Custom calls that XLA makes for its own ends: AllocateBuffer, ConcatBitcast, SliceId and the like."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device.

    Attributes:
        arguments: train state and batch.
        output: the new state and the metrics.
        aliased: the part of the output that takes the place of arguments.
        temporaries: all else that is allotted while the step runs.
        temp_size: what JAX calls `temp_size_in_bytes`, for comparison with others: on TPUs it is another number, and
            not the one that the compiler holds against the memory of a chip.
        code: the program.
        host: what is kept in host memory, of all these.
    """

    arguments: int
    output: int
    aliased: int
    temporaries: int
    temp_size: int
    code: int
    host: int

    @property
    def total(self) -> int:
        """What must fit the device."""
        return self.arguments + self.output - self.aliased + self.temporaries + self.code


@dataclass(frozen=True, kw_only=True)
class Executable:
    """Holds the HLO of a compiled program and the memory of one device."""

    text: str
    memory: Memory


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A custom call, for which the compiler has no estimate.

    Attributes:
        name: of the instruction, without its number.
        target: what is called.
        loops: while loops around it.
        runs: in one step.
    """

    name: str
    target: str
    loops: int
    runs: int


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What is known of a compiled step.

    Attributes:
        name: of the run.
        on: the topology, as in `--on`.
        mesh: axes of more than one device.
        rows: of one device in one step: its part of the global batch.
        memory: of one device.
        cycles: estimated by the compiler for one step of one device, loops multiplied out; None where it estimates
            none (GPUs).
        unestimated: instructions that it has no estimate for.
        unknown_loops: loops whose length is not known: counted once everywhere.
        kernels: custom calls, not in the cycles.
        traffic: collectives, not in the cycles.
    """

    name: str
    on: str
    mesh: dict[str, int]
    rows: float
    memory: Memory
    cycles: int | None
    unestimated: int
    unknown_loops: list[str]
    kernels: list[Kernel]
    traffic: list[Traffic]


def program_for(run: Run, topology: Topology) -> Program:
    """The program of a run on described devices; a mesh axis of -1 takes what is left of them.

    A run that does not fit the topology, or whose compiler is not installed, is a ConfigError.
    """
    fixed, free = math.prod(size for size in run.mesh.sizes if size != -1), run.mesh.sizes.count(-1)
    if fixed < 1 or free > 1:
        validate(run)  # says which size is wrong
    prepare(topology)
    described = devices(topology)
    if topology.count % fixed or (fixed != topology.count and not free):
        fix = f"axes that divide {topology.count}" if free else "mesh.fsdp=-1, or a topology of that size"
        raise ConfigError(f"--on {topology}: has {topology.count} devices, the mesh asks for {fixed}; use {fix}")
    run = resolved(run, topology.count)
    validate(run)
    return Program(run, make_mesh(run.mesh, described))


def compile_step(
    run: Run,
    topology: Topology,
    *,
    dump: Callable[[str], object] | None = None,
    report: Callable[[str], object] = print,
) -> Compiled:
    """Compiles the train step and reads what came of it.

    `dump` takes the compiled text, `report` a line before each thing that takes long. A ConfigError where the run does
    not fit the topology or its memory, or where the compiler or what it needs is not here.
    """
    started_s = time.monotonic()
    program = program_for(run, topology)
    rows = program.run.train.global_batch / program.partitioner.num_shards("batch")
    report(f"tracing {run.name} for {topology}, {topology.count} devices")
    executable = _compiled(program, topology, rows, report)
    report(f"compiled after {time.monotonic() - started_s:.0f} s")
    if dump is not None:
        dump(executable.text)
    module = Module(executable.text)
    placed = domains(topology, list(np.asarray(program.mesh.devices).flat))
    instructions = [i for place in module.executed() for i in place.computation.instructions.values()]
    return Compiled(
        name=program.run.name,
        on=str(topology),
        mesh={axis: size for axis, size in program.mesh.shape.items() if size > 1},
        rows=rows,
        memory=executable.memory,
        cycles=module.cycles() if any(i.cycles is not None for i in instructions) else None,
        unestimated=sum(i.cycles == NO_ESTIMATE for i in instructions),
        unknown_loops=module.unknown_loops(),
        kernels=_kernels(module),
        traffic=summed(collectives(module, dict(program.mesh.shape), placed)),
    )


def memory_of(executable: Any) -> Memory:
    """What a compiled program takes of each device."""
    stats = executable.memory_analysis()
    outlasting = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    hosted = stats.host_argument_size_in_bytes + stats.host_output_size_in_bytes - stats.host_alias_size_in_bytes
    return Memory(
        arguments=stats.argument_size_in_bytes,
        output=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.total_allocation_bytes - outlasting,
        temp_size=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
        host=hosted + stats.host_temp_size_in_bytes,
    )


def compile_lowered(lowered: Any, program: Program, topology: Topology) -> Executable:
    """Compiles a lowered program; all that its result depends on is in the arguments, so it can be kept."""
    del program, topology  # in `lowered`, but not in its text
    with no_cache():
        executable = lowered.compile()
    return Executable(text=executable.as_text(), memory=memory_of(executable))


def _compiled(program: Program, topology: Topology, rows: float, report: Callable[[str], object]) -> Executable:
    """The executable; a ConfigError where the train state alone does not fit, or the compiler refuses."""
    stored, there = _state_bytes(program), topology.chip.hbm_bytes
    if stored > there:
        why = too_big(stored, there, "use more devices, or mesh.fsdp in place of mesh.replica", " of train state")
        raise ConfigError(f"{program.run.name} on {topology}: {why}")
    try:
        lowered = program.lower()
        report("compiling: seconds for a small model, a minute or two for a large one")
        return compile_lowered(lowered, program, topology)
    except RuntimeError as error:  # JaxRuntimeError, from the compiler, is one of them
        why = explained(str(error), program.run, rows)
        raise ConfigError(f"{program.run.name} on {topology}: {why}") from error


def _state_bytes(program: Program) -> int:
    """What one device keeps of the train state in its own memory, before the compiler pads it."""
    return per_device_bytes([a for a in jax.tree.leaves(program.state) if a.sharding.memory_kind != "pinned_host"])


@contextmanager
def no_cache() -> Iterator[None]:
    """JAX's cache of compiled programs is left alone: it can write those of a described device but not read them."""
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX asks once a process whether there is one
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def _kernels(module: Module) -> list[Kernel]:
    """All custom calls that compute, those of one name and loop level together; of a choice the branch with most."""
    runs: Counter[tuple[int, str, str]] = Counter()
    for place in module.executed(lambda place: place.times * len(list(_custom_calls(place)))):
        for name, target in _custom_calls(place):
            runs[place.loops, name, target] += place.times
    return [Kernel(loops=loops, name=name, target=target, runs=n) for (loops, name, target), n in sorted(runs.items())]


def _custom_calls(place: Place) -> Iterator[tuple[str, str]]:
    """Name and target of what is called there that computes and has no estimate."""
    for instruction in place.computation.instructions.values():
        target = instruction.text("custom_call_target") if instruction.kind == "custom-call" else None
        if target is not None and not _OF_THE_COMPILER.fullmatch(target) and instruction.cycles is None:
            yield instruction.name.rstrip("0123456789").rstrip("."), target
