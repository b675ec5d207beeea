"""The plan of a run on hardware: the time of a step, with bounds, what limits it, and its MFU.

It reads the program that `compile_for` has compiled, which is the one that trains.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from jaxinfra.machine.chips import Chip
from jaxinfra.models.transformer import TransformerConfig
from jaxinfra.ops.attention import splash_block
from jaxinfra.plan import roofline
from jaxinfra.plan.aot import Compilation
from jaxinfra.plan.step_time import CORES, Attention, Cause, Rates, Spent, StepTimer
from jaxinfra.program import Program
from jaxinfra.train.statistics import step_flops


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """The estimated time of a step, and what it follows from. Times are in seconds."""

    name: str  # of the run
    topology: str
    mesh: Mapping[str, int]  # axes above 1
    devices: int
    device_kind: str  # JAX's, or how it begins
    chips: int
    samples: int  # of a step, on all devices
    units_per_sample: int  # such as tokens
    lower_s: float  # if nothing waits
    estimate_s: float
    upper_s: float  # if nothing overlaps
    work: Mapping[Cause, float]  # seconds of each unit in a step
    waits: Mapping[Cause, float]  # seconds for which the cores wait for it
    flops: float  # of a step on all devices, as of MFU
    peak_flops: float  # of a device in bfloat16
    memory_bytes: int
    hbm_bytes: int
    unknown_loops: tuple[str, ...]  # that count once
    bubble: float = 0.0  # part of a step in which a pipeline stage idles, while its program goes on
    hosts: int = 1
    batch_bytes: int = 0  # that are read for a step, on all hosts
    checkpoint_bytes: int = 0  # of the whole train state
    is_roofline: bool = False  # whether times follow from FLOPs and bytes, not from the compiler's cycles

    @property
    def mfu(self) -> float:
        """Model FLOPs over what the chips can do in bfloat16."""
        return self.flops / (self.estimate_s * self.peak_flops * self.devices)

    @property
    def units_per_s(self) -> float:
        """Such as tokens a second, on all devices."""
        return self.samples * self.units_per_sample / self.estimate_s

    @property
    def parts(self) -> dict[str, float]:
        """The seconds of a step by cause, which add up to the estimate; the longest first."""
        cores = {cause: (1 - self.bubble) * seconds for cause, seconds in self.work.items() if cause in CORES}
        idle = {"pipeline bubbles": sum(cores.values()) * self.bubble / (1 - self.bubble)} if self.bubble else {}
        waits = {f"waits for {cause}": seconds for cause, seconds in self.waits.items()}
        return dict(sorted({**cores, **idle, **waits}.items(), key=lambda part: -part[1]))

    @property
    def binds(self) -> str:
        """The cause that takes the largest part of a step."""
        return next(iter(self.parts))


def plan_step(compilation: Compilation, *, fused_backward: bool = False) -> StepPlan:
    """Estimates the time of a compiled step; for GPUs, whose compiler estimates no cycles, by a roofline.

    `fused_backward` takes the backward pass of attention as if it were one kernel, as in others' programs.
    """
    program, topology = compilation.program, compilation.topology
    chip = topology.chip
    spent = time_step(compilation, rates_of(chip), fused_backward=fused_backward)
    return StepPlan(
        name=program.run.name,
        topology=str(topology),
        mesh={axis: size for axis, size in program.mesh.shape.items() if size > 1},
        devices=topology.num_devices,
        device_kind=chip.device_kind,
        chips=topology.num_devices // chip.devices_per_chip,
        samples=program.run.train.global_batch,
        units_per_sample=program.run.data.units_per_sample,
        lower_s=spent.lower_s * (1.0 if chip.clock_hz else roofline.LOWER),
        estimate_s=spent.estimate_s,
        upper_s=spent.upper_s * (1.0 if chip.clock_hz else roofline.UPPER),
        bubble=_bubble(program),
        hosts=len({device.process_index for device in compilation.devices}),
        batch_bytes=_bytes(program.batch),
        checkpoint_bytes=_bytes(program.saved),
        is_roofline=chip.clock_hz is None,
        work=spent.work,
        waits=spent.waits,
        flops=step_flops(program),
        peak_flops=chip.peak_flops,
        memory_bytes=compilation.memory.total,
        hbm_bytes=chip.hbm_bytes,
        unknown_loops=tuple(compilation.module.unknown_loops()),
    )


def _bubble(program: Program) -> float:
    """Returns the part of a step in which a pipeline stage idles; 0 without a pipeline."""
    stages = program.mesh.shape["stage"]
    run = program.run
    return run.pipeline.make_schedule(stages, run.train.accumulate).bubble if stages > 1 else 0.0


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def rates_of(chip: Chip) -> Rates:
    """Returns what units of a chip reach, as fitted for it, else the usual rates."""
    return Rates(**chip.rates)


def time_step(compilation: Compilation, rates: Rates, *, fused_backward: bool = False) -> Spent:
    """Walks the compiled text."""
    topology, is_gpu = compilation.topology, compilation.topology.chip.platform == "cuda"
    coords = np.array([[each.process_index] if is_gpu else each.coords for each in compilation.devices])
    attention = attention_work(compilation.program, topology.chip)
    if attention is not None:
        attention = replace(attention, fused_backward=fused_backward)
    timer = StepTimer(
        compilation.module,
        compilation.collectives,
        topology.chip,
        coords,
        topology.wrap,
        rates,
        attention,
        topology.slices,
    )
    return timer.run()


def attention_work(program: Program, chip: Chip) -> Attention | None:
    """Returns the work of attention in a step on one device; None for models whose attention is not known."""
    run, model = program.run, program.run.model
    seq_len = getattr(run.data, "seq_len", None)
    if not isinstance(model, TransformerConfig) or seq_len is None:
        return None
    flops = 0.0
    for layer in model.training_layers:
        if (attention := layer.mixer.attention(model.hidden_size)) is not None:
            _, heads = attention
            # Kernels compute whole blocks, also where the mask hides half of one.
            keys = layer.mixer.visible_keys(model.hidden_size, seq_len) + splash_block(seq_len) / 2
            # A matrix unit takes a head that does not fill it for as long as one that does.
            columns = chip.mxu_columns or 1
            filled = sum(columns * math.ceil(dim / columns) for dim in (heads.head_dim, heads.value_dim))
            flops += 2 * seq_len * keys * heads.num_heads * filled / 2
    rows = run.train.global_batch / program.mesh.size
    return Attention(matmul_flops=flops * rows, peak_flops=chip.peak_flops)
