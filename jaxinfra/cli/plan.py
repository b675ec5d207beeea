"""`python -m launch plan CONFIG --on TOPOLOGY`: how long a step takes on absent hardware, and what limits it."""

import argparse
import functools
from collections.abc import Iterator
from dataclasses import asdict

from jaxinfra.cli import config_argument
from jaxinfra.cli.compile import check_fits
from jaxinfra.errors import ConfigError
from jaxinfra.plan.aot import compile_for
from jaxinfra.plan.chips import load_chips
from jaxinfra.plan.estimate import StepPlan, plan_step
from jaxinfra.plan.topology import parse_topology
from jaxinfra.storage import outputs
from jaxinfra.track.formatting import format_bytes, format_percent

_NOTHING_S = 0.0005  # parts below this are not shown


def run(options: argparse.Namespace) -> None:
    """Compiles the train step, and prints its time and parts; ConfigError if it does not fit."""
    if options.devices is not None:
        raise ConfigError(f"--devices {options.devices}: plan uses no devices; name the hardware with --on")
    topology = parse_topology(options.on, load_chips(options.chips))
    if topology.chip.platform == "cuda":
        raise ConfigError(f"--on {topology}: plan needs cycles, which no compiler estimates for GPUs; use compile --on")
    if options.json is not None:
        outputs.check_writable(options.json)
    loaded = config_argument.load_config(options)
    compiled = compile_for(loaded.run, topology, on_progress=functools.partial(print, flush=True))
    check_fits(loaded.run, compiled.summary(), topology.chip)
    plan = plan_step(compiled)
    print("\n".join(format_plan(plan)))
    values = {"mfu": plan.mfu, "units_per_s": plan.units_per_s, "binds": plan.binds, "parts": plan.parts}
    outputs.write_json(options.json, asdict(plan) | values)


def format_plan(plan: StepPlan) -> Iterator[str]:
    """Yields the lines of a plan."""
    mesh = " x ".join(f"{axis} {n}" for axis, n in plan.mesh.items()) or "one device"
    rows = plan.samples / plan.devices
    yield f"{plan.name} on {plan.topology}: {mesh}, {rows:g} sequences of {plan.units_per_sample:,} a device and step"
    peak = f"{plan.peak_flops / 1e12:,.0f} TFLOP/s in bfloat16 a device"
    bounds = f"{plan.lower_s:.3f} s if nothing waits, {plan.upper_s:.3f} s if nothing overlaps"
    lines = {
        "step": f"{plan.estimate_s:.3f} s    {bounds}",
        "MFU": f"{format_percent(plan.mfu)} of {peak}",
        "tokens": f"{plan.units_per_s / plan.chips:,.0f} a second and chip, {plan.units_per_s:,.0f} in all",
        "memory": f"{format_bytes(plan.memory_bytes)} of {format_bytes(plan.hbm_bytes)} a device",
        "binds": plan.binds,
    }
    for name, text in lines.items():
        yield f"  {name:8}  {text}"
    if plan.unknown_loops:
        yield f"  counted once, because their trip count is unknown: loops {', '.join(plan.unknown_loops)}"
    yield "\nWhere the time of a step goes"
    for cause, seconds in plan.parts.items():
        if seconds > _NOTHING_S:
            yield f"  {cause:16}  {seconds:8.3f} s  {format_percent(seconds / plan.estimate_s):>7}"
    for cause, seconds in plan.work.items():
        hidden_s = seconds - plan.waits.get(cause, 0.0)
        if cause not in plan.parts and hidden_s > _NOTHING_S:
            yield f"  {cause:16}  {hidden_s:8.3f} s  at the same time"
