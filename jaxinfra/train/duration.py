"""Estimates how long the steps of a run take on this machine, from what has been measured here."""

import os

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxinfra.machine.measured import cpu_name, keep_measured, read_measured
from jaxinfra.machine.peak_flops import kept_cpu_peak, measure_cpu_peak
from jaxinfra.machine.platforms import default_platform
from jaxinfra.program import Program
from jaxinfra.track.base import RunStatistics
from jaxinfra.track.formatting import format_number
from jaxinfra.train.statistics import step_flops

_CPU_MFU = 0.3  # of small models


def time_statistic(program: Program, steps: int) -> RunStatistics:
    """Returns a row with the time of some steps on this machine; {} if the run is for others, or nothing is known.

    A step is as fast as in the last run of this shape; before the first one, that follows from the peak of the CPU. In
    float32 the peak is measured if none is kept, in half a second.
    """
    count = int(os.environ.get("JAX_NUM_CPU_DEVICES", "1"))  # asking JAX would take the devices
    is_abstract = not isinstance(program.mesh, Mesh)
    if is_abstract and (default_platform() != "cpu" or program.mesh.size not in (1, count)):
        return {}
    step_s, how = read_measured(_step_name(program)), "as in the last run of this shape"
    if step_s is None and program.partitioner.platform == "cpu":
        dtype, how = jnp.dtype(program.run.precision.compute), f"estimated from {_CPU_MFU:.0%} of the peak"
        peak_flops = kept_cpu_peak(dtype)
        if peak_flops is None and dtype == jnp.float32:
            peak_flops = measure_cpu_peak(jax.devices()[0], dtype)
        step_s = peak_flops and step_flops(program) / (_CPU_MFU * peak_flops)
    if step_s is None:
        return {}
    total_s = steps * step_s
    total = f"{max(total_s, 1):.0f} s" if total_s < 100 else f"{total_s / 60:,.0f} min"
    return {"time": (total, f"here: {steps:,} steps of {format_number(float(f'{step_s:.2g}'))} s, {how}")}


def keep_step_time(program: Program, step_s: float | None) -> None:
    """Keeps the time of a step, if it was measured, for `time_statistic`."""
    if step_s is not None:
        keep_measured(_step_name(program), step_s)


def _step_name(program: Program) -> str:
    """Names what decides how long a step takes: the hardware, and the shape of the run."""
    run, on_cpu = program.run, program.partitioner.platform == "cpu"
    hardware = cpu_name() if on_cpu else jax.devices()[0].device_kind
    mesh = "".join(f", {axis}={size}" for axis, size in program.mesh.shape.items() if size > 1)
    shape = f"{program.num_params} parameters, {step_flops(program):.6g} FLOPs, {run.precision.compute}"
    remat = getattr(run.model, "remat", "none")
    return f"seconds a step, {hardware}{mesh}, {shape}, accumulate={run.train.accumulate}, remat={remat}"
