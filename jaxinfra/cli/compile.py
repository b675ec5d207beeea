"""`python -m launch compile CONFIG --on TOPOLOGY`: compiles the train step for hardware that is not here."""

import argparse
import functools
import math
import os
from collections.abc import Iterator
from dataclasses import asdict

from jaxinfra.cli import config_argument
from jaxinfra.errors import ConfigError
from jaxinfra.machine.chips import Chip, load_chips
from jaxinfra.plan.aot import CompiledStep, compile_step
from jaxinfra.plan.compile_errors import out_of_memory, suggest_fix
from jaxinfra.plan.topology import parse_topology
from jaxinfra.run import Run
from jaxinfra.storage import outputs
from jaxinfra.track.formatting import format_bytes, format_percent


def run(options: argparse.Namespace) -> None:
    """Compiles, and prints memory, cycles, kernels and collectives; ConfigError if the step does not fit a device."""
    if options.devices is not None:
        raise ConfigError(f"--devices {options.devices}: compile uses no devices; name the hardware with --on")
    topology = parse_topology(options.on, load_chips(options.chips))
    paths = [path for path in (options.dump, options.json) if path is not None]
    for path in paths:
        outputs.check_writable(path)
    if len({os.path.abspath(path) for path in paths}) < len(paths):
        raise ConfigError(f"--json and --dump {options.dump}: are the same file; name two files")
    loaded = config_argument.load_config(options)
    dump = None if options.dump is None else functools.partial(outputs.write_text, options.dump)
    compiled = compile_step(loaded.run, topology, dump=dump, on_progress=functools.partial(print, flush=True))
    print("\n".join(format_report(compiled, topology.chip)))
    outputs.write_json(options.json, asdict(compiled))
    check_fits(loaded.run, compiled, topology.chip)


def check_fits(run: Run, compiled: CompiledStep, chip: Chip) -> None:
    """Raises ConfigError if a step needs more memory than a device has, with what would help."""
    needed_bytes, hbm_bytes = compiled.memory.total, chip.hbm_bytes
    if needed_bytes > hbm_bytes:  # the TPU compiler raises this itself, the GPU compiler does not
        temporaries = compiled.memory.temporaries
        room = hbm_bytes - (needed_bytes - temporaries)
        fix = suggest_fix(run, compiled.per_device_batch_size, temporaries / room if room > 0 else math.inf)
        raise ConfigError(f"{compiled.name} on {compiled.topology}: {out_of_memory(needed_bytes, hbm_bytes, fix)}")


def format_report(compiled: CompiledStep, chip: Chip) -> Iterator[str]:
    """Yields the lines of the report."""
    mesh = " x ".join(f"{axis} {n}" for axis, n in compiled.mesh.items()) or "one device"
    yield f"{compiled.name} on {compiled.topology}: {mesh}, per-device batch size {compiled.per_device_batch_size:g}"
    yield from _memory_lines(compiled, chip)
    yield from _compute_lines(compiled, chip)
    if compiled.traffic:
        yield f"\nCollectives of one step, on one device{'' if compiled.cycles is None else ' (not in the cycles)'}"
        yield f"  {'loops':5}  {'kind':18}  {'over':22}  {'links':7}  {'arrays':>6}  {'moved':>7}  {'bytes':>11}"
    for row in compiled.traffic:
        over = ", ".join(row.axes) or "-"
        yield (
            f"  {row.loops:5}  {row.kind:18}  {over:22}  {row.link:7}  {row.arrays:6}  {row.runs:7,}  "
            f"{format_bytes(row.bytes):>11}"
        )


def _memory_lines(compiled: CompiledStep, chip: Chip) -> Iterator[str]:
    memory = compiled.memory
    yield "\nMemory of one device"
    rows = {
        "arguments": (memory.arguments, "train state and batch"),
        "temporaries": (memory.temporaries, "largest at any time"),
        "output": (memory.output, f"{format_bytes(memory.aliased)} of it reuses the arguments"),
        "code": (memory.code, ""),
        "total": (memory.total, f"{format_percent(memory.total / chip.hbm_bytes)} of {format_bytes(chip.hbm_bytes)}"),
    }
    if memory.host:
        rows["in host memory"] = (memory.host, "not in the total")
    for name, (n_bytes, note) in rows.items():
        yield f"  {name:14}  {format_bytes(n_bytes):>11}  {note}".rstrip()


def _compute_lines(compiled: CompiledStep, chip: Chip) -> Iterator[str]:
    if compiled.cycles is not None and chip.clock_hz is not None:
        seconds, clock_ghz = compiled.cycles / chip.clock_hz, chip.clock_hz / 1e9
        yield "\nCompute of one step, estimated by the compiler"
        yield f"  cycles             {compiled.cycles:15,}  {seconds:.4f} s at {clock_ghz:.2f} GHz"
        yield f"  cycles per sample  {compiled.cycles / compiled.per_device_batch_size:15,.0f}"
        if compiled.unestimated:
            yield f"  instructions without an estimate: {compiled.unestimated}"
    if compiled.unknown_loops:
        yield f"\nCounted once, because their trip count is unknown: loops {', '.join(compiled.unknown_loops)}"
    if compiled.kernels:
        yield f"\nKernels{'' if compiled.cycles is None else ' without an estimate (not in the cycles)'}"
        yield f"  {'loops':5}  {'name':44}  {'target':28}  {'runs':>6}"
    for kernel in compiled.kernels:
        yield f"  {kernel.loops:5}  {kernel.name:44}  {kernel.target:28}  {kernel.runs:6,}"
