"""Compiles the train step of a run ahead of time for a topology, and reads memory, cycles and collectives from it.

The program is the one that `Program` trains with. Memory is what the compiler allocates; cycles and collectives are
read from the compiled text.
"""

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from jaxinfra.config import validate
from jaxinfra.errors import ConfigError
from jaxinfra.parallel.mesh import Device, abstract_mesh, make_mesh
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.plan.collectives import CollectiveFinder, Traffic, summarize
from jaxinfra.plan.compile_errors import explain, join_objections, out_of_memory
from jaxinfra.plan.hlo import NO_ESTIMATE, Call, HloModule
from jaxinfra.plan.topology import Topology, set_up_compiler, slice_ids, topology_devices
from jaxinfra.program import Program
from jaxinfra.run import Run, with_mesh_size
from jaxinfra.run.compiler_options import compiler_options
from jaxinfra.train.statistics import per_device_bytes

# Targets of custom calls that XLA inserts itself, such as AllocateBuffer, ConcatBitcast and SliceId.
_XLA_TARGET = re.compile(r"[A-Z][A-Za-z]*|annotate_device_placement")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device."""

    arguments: int  # train state and batch
    output: int  # new train state and metrics
    aliased: int  # part of the output that reuses the arguments' memory
    temporaries: int  # everything else that is allocated while the step runs
    temp_size: int  # JAX's `temp_size_in_bytes`, which others publish; on TPUs it differs from `temporaries`
    code: int
    host: int  # in host memory, not in the total

    @property
    def total(self) -> int:
        """Bytes that must fit the device."""
        return self.arguments + self.output - self.aliased + self.temporaries + self.code


@dataclass(frozen=True, kw_only=True)
class CompiledProgram:
    """The HLO text of a compiled program and its memory."""

    text: str
    memory: Memory


type Compiler = Callable[[jax.stages.Lowered, Program, Topology], CompiledProgram]
"""Compiles a lowered program, given the program and the topology that it is of."""


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """All custom calls of one name and target at one loop depth, such as Pallas kernels; their cycles are unknown."""

    name: str
    target: str
    loops: int  # while loops around it
    runs: int  # in one step


@dataclass(frozen=True, kw_only=True)
class CompiledStep:
    """Memory, cycles and collectives of a compiled train step, on one device."""

    name: str  # of the run
    topology: str
    mesh: dict[str, int]  # axes above 1
    per_device_batch_size: float
    memory: Memory
    cycles: int | None  # estimated, without kernels and collectives; None for GPUs
    unestimated: int  # instructions without an estimate
    unknown_loops: list[str]  # with unknown trip count; their bodies count once
    kernels: list[Kernel]
    traffic: list[Traffic]


def program_on(run: Run, topology: Topology) -> Program:
    """Builds the program of a run on a topology; raises ConfigError with all that does not fit it or is missing."""
    fixed = math.prod(size for size in run.mesh.sizes if size != -1)
    if fixed < 1 or run.mesh.sizes.count(-1) > 1:
        validate(run)  # raises an error that names the wrong axis
    platform = "gpu" if topology.chip.platform == "cuda" else "tpu"
    objections: list[str] = []
    _attempt(lambda: set_up_compiler(topology), objections)
    devices = None if objections else topology_devices(topology)
    if changes := _mesh_changes(run.mesh, fixed, topology):
        fix = " ".join(f"mesh.{axis}={size}" for axis, size in changes.items())
        objections.append(f"--on {topology}: has {topology.num_devices} devices, but the mesh has {fixed}; use {fix}")
    run = with_mesh_size(replace(run, mesh=replace(run.mesh, **changes)), topology.num_devices)
    _attempt(lambda: validate(run), objections)
    _attempt(lambda: compiler_options(run.train.compiler, platform), objections)
    mesh = None if devices is None else _attempt(lambda: make_mesh(run.mesh, devices), objections)
    if objections and devices is not None and platform == "gpu":
        _attempt(lambda: _require_cudnn(run), objections)
    if mesh is None or objections:
        raise ConfigError(join_objections(objections))
    return Program(run, mesh)


def _attempt[T](check: Callable[[], T], objections: list[str]) -> T | None:
    """Returns the result of a check; one that raises a ConfigError is added to the objections."""
    try:
        return check()
    except ConfigError as error:
        objections.append(str(error))
        return None


def _mesh_changes(mesh: MeshConfig, fixed: int, topology: Topology) -> dict[str, int]:
    """Returns axes and sizes with which a mesh fits a topology; the axes but fsdp stay if they divide its devices."""
    num_devices = topology.num_devices
    if num_devices == fixed or (-1 in mesh.sizes and num_devices % fixed == 0):
        return {}
    others = {axis: size for axis, size in asdict(mesh).items() if axis != "fsdp"}
    kept = math.prod(size for size in others.values() if size != -1)
    changes = {axis: 1 for axis, size in others.items() if size == -1 or (size > 1 and num_devices % kept)}
    if "replica" in changes:
        changes["replica"] = topology.slices
    return {**changes, "fsdp": -1}


def _require_cudnn(run: Run) -> None:
    """Raises ConfigError if the attention of a run takes cuDNN's kernel, which is not installed."""
    one_device = MeshConfig(fsdp=1)
    train = replace(run.train, compiler="default")
    program = Program(replace(run, mesh=one_device, train=train), abstract_mesh(one_device), "gpu")
    try:
        program.lower()
    except RuntimeError as error:
        raise ConfigError(explain(str(error), run, program.rows_per_device)) from error


@dataclass(frozen=True, kw_only=True)
class Compilation:
    """A compiled train step, and what it was compiled for."""

    program: Program
    topology: Topology
    module: HloModule
    memory: Memory

    @property
    def devices(self) -> list[Device]:
        """The devices by the number that they have in the text."""
        return list(np.asarray(self.program.mesh.devices).flat)

    @property
    def collectives(self) -> CollectiveFinder:
        """Finds the collectives of a part of the text."""
        slices = slice_ids(self.topology, self.devices)
        return CollectiveFinder(self.module, dict(self.program.mesh.shape), slices)

    def summary(self) -> CompiledStep:
        """Returns memory, cycles and collectives."""
        module, mesh = self.module, dict(self.program.mesh.shape)
        instructions = [i for call in module.calls() for i in call.computation.instructions.values()]
        estimates = [instruction.cycles for instruction in instructions if instruction.cycles is not None]
        return CompiledStep(
            name=self.program.run.name,
            topology=str(self.topology),
            mesh={axis: size for axis, size in mesh.items() if size > 1},
            per_device_batch_size=self.program.rows_per_device,
            memory=self.memory,
            cycles=module.cycles() if estimates else None,
            unestimated=estimates.count(NO_ESTIMATE),
            unknown_loops=module.unknown_loops(),
            kernels=_kernels(module),
            traffic=summarize(self.collectives.all()),
        )


def compile_step(
    run: Run,
    topology: Topology,
    *,
    dump: Callable[[str], object] | None = None,
    on_progress: Callable[[str], object] = lambda line: None,
) -> CompiledStep:
    """Compiles the train step of a run and reads its memory, cycles and collectives; see `compile_for`."""
    return compile_for(run, topology, dump=dump, on_progress=on_progress).summary()


def compile_for(
    run: Run,
    topology: Topology,
    *,
    dump: Callable[[str], object] | None = None,
    on_progress: Callable[[str], object] = lambda line: None,
    compiler: Compiler | None = None,
) -> Compilation:
    """Compiles the train step of a run.

    `dump` receives the compiled text, `on_progress` a line before each slow part. `compiler` may have a cache. Raises
    ConfigError if the run does not fit the topology or its memory, or if the compiler is missing or fails.
    """
    start_s = time.monotonic()
    program = program_on(run, topology)
    on_progress(f"tracing {run.name} for {topology}, {topology.num_devices} devices")
    compiled = _compile(program, topology, compiler or compile_lowered, on_progress)
    on_progress(f"compiled after {time.monotonic() - start_s:.0f} s")
    if dump is not None:
        dump(compiled.text)
    return Compilation(program=program, topology=topology, module=HloModule(compiled.text), memory=compiled.memory)


def memory_usage(executable: jax.stages.Compiled) -> Memory:
    """Reads the memory of a compiled program."""
    stats = executable.memory_analysis()
    assert stats is not None
    state_and_batch = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    host = stats.host_argument_size_in_bytes + stats.host_output_size_in_bytes - stats.host_alias_size_in_bytes
    return Memory(
        arguments=stats.argument_size_in_bytes,
        output=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.total_allocation_bytes - state_and_batch,
        temp_size=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
        host=host + stats.host_temp_size_in_bytes,
    )


def compile_lowered(lowered: jax.stages.Lowered, program: Program, topology: Topology) -> CompiledProgram:
    """Compiles a lowered program; tests replace this function by one with a cache that reads all three arguments."""
    del program, topology
    with no_compilation_cache():
        executable = lowered.compile()
    text = executable.as_text()
    assert text is not None
    return CompiledProgram(text=text, memory=memory_usage(executable))


def _compile(
    program: Program, topology: Topology, compiler: Compiler, on_progress: Callable[[str], object]
) -> CompiledProgram:
    """Compiles the train step; raises ConfigError if its state does not fit, or if the compiler fails."""
    where = f"{program.run.name} on {topology}"
    # A lower bound: the compiler pads arrays. State that is offloaded to the host does not count.
    on_device = [leaf for leaf in jax.tree.leaves(program.state) if leaf.sharding.memory_kind != "pinned_host"]
    state_bytes, hbm_bytes = per_device_bytes(on_device), topology.chip.hbm_bytes
    if state_bytes > hbm_bytes:
        fix = "use more devices, or mesh.fsdp in place of mesh.replica"
        raise ConfigError(f"{where}: {out_of_memory(state_bytes, hbm_bytes, fix, ' for the train state')}")
    try:
        lowered = program.lower()
        on_progress("compiling, if no cache has it: seconds for a small model, minutes for a large one")
        return compiler(lowered, program, topology)
    except RuntimeError as error:  # the compiler's JaxRuntimeError, or one raised while tracing
        held_bytes = state_bytes + per_device_bytes(jax.tree.leaves(program.params))  # with the sums of gradients
        cause = explain(str(error), program.run, program.rows_per_device, held_bytes)
        raise ConfigError(f"{where}: {cause}") from error


@contextmanager
def no_compilation_cache() -> Iterator[None]:
    """Disables JAX's compilation cache, which can write programs for unattached devices but not read them."""
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # else JAX remembers that the cache was enabled
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def _kernels(module: HloModule) -> list[Kernel]:
    """Lists the kernels; of a conditional, only the branch with the most kernel calls counts."""
    runs: Counter[tuple[int, str, str]] = Counter()
    for call in module.calls(lambda call: call.runs * len(_kernel_calls(call))):
        for name, target in _kernel_calls(call):
            runs[call.loops, name, target] += call.runs
    return [Kernel(loops=loops, name=name, target=target, runs=n) for (loops, name, target), n in sorted(runs.items())]


def _kernel_calls(call: Call) -> list[tuple[str, str]]:
    """Returns name and target of each custom call without estimated cycles."""
    return [
        (instruction.name.rstrip("0123456789").rstrip("."), target)  # `splash_fwd.12` is `splash_fwd`
        for instruction in call.computation.instructions.values()
        if instruction.opcode == "custom-call" and instruction.cycles is None
        if (target := instruction.quoted("custom_call_target")) and not _XLA_TARGET.fullmatch(target)
    ]
