"""`python -m launch show CONFIG`: prints the resolved config and its statistics; uses no devices but the CPU."""

import argparse
import math

import jax
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxinfra.cli import config_argument
from jaxinfra.command import command_line
from jaxinfra.config import dump, read_record, validate
from jaxinfra.config.record import config_without_classes
from jaxinfra.config.source import find_record
from jaxinfra.optim.schedules import lr_table
from jaxinfra.parallel.mesh import abstract_mesh
from jaxinfra.parallel.schedules import format_schedule
from jaxinfra.parallel.spec import leaf_name
from jaxinfra.program import Program
from jaxinfra.run import with_mesh_size
from jaxinfra.track.console import fitted_table, print_table, statistics_table, stdout_console
from jaxinfra.track.terminal_plot import plot_curve
from jaxinfra.train.duration import time_statistic
from jaxinfra.train.statistics import run_statistics


def run(options: argparse.Namespace) -> None:
    """Prints the config; without --changed also its statistics, pipeline schedule, parameters and learning rate."""
    # The classes of a record are needed for the last three alone.
    file = None if options.overrides or options.imports else find_record(options.config)
    if file is not None and (record := read_record(file)).get("classes"):
        for line in dump(config_without_classes(record)).splitlines():
            if not options.changed or line.partition(" = ")[0] in record.get("origins", {}):
                print(line)
        if not options.changed:
            print_table(stdout_console(), statistics_table(record.get("derived", {})))
        return
    loaded = config_argument.load_config(options)
    num_devices = options.devices.partition(":")[2] if options.devices else ""
    known_sizes = math.prod(size for size in loaded.run.mesh.sizes if size != -1)
    run = with_mesh_size(loaded.run, int(num_devices or known_sizes))
    validate(run)
    program = Program(run, abstract_mesh(run.mesh))
    console = stdout_console()
    for line in dump(run).splitlines():
        path = line.partition(" = ")[0]
        if options.changed and path not in loaded.origins:
            continue
        origin = f"  [dim]# {escape(loaded.origins[path])}[/dim]" if path in loaded.origins else ""
        console.print(escape(line) + origin, soft_wrap=True)
    if options.changed:
        return
    print_table(console, statistics_table({**run_statistics(program), **time_statistic(program, run.train.steps)}))
    plan = command_line("plan", options.config, *options.overrides, "--on", "v5p:4x4x4")
    console.print(f"Time and cost on chips that are not here: {escape(plan)}", soft_wrap=True)
    if run.mesh.stage > 1:
        console.print("Pipeline: one column per tick, forward (F) and backward (B) of each microbatch", style="bold")
        for row in format_schedule(run.pipeline.make_schedule(run.mesh.stage, run.train.accumulate)):
            console.print(row, markup=False, soft_wrap=True)
    print_table(console, _parameter_table(console, program))
    optim, steps = run.optim, run.train.steps
    console.print(f"Learning rate over {steps:,} steps", style="bold")
    for step, rate in lr_table(optim.schedule, peak_lr=optim.peak_lr, steps=steps):
        console.print(f"{step:>12,}  {rate:.2e}")
    console.print(plot_curve(lr_table(optim.schedule, peak_lr=optim.peak_lr, steps=steps, rows=200)), markup=False)


def _parameter_table(console: Console, program: Program) -> Table:
    rows = list[tuple[str, ...]]()
    arrays = jax.tree.leaves(program.params)
    for (path, spec), array in zip(jax.tree.leaves_with_path(program.specs), arrays, strict=True):
        name = leaf_name(path)
        axes = ", ".join(f"{dim}:{axis}" for dim, axis in enumerate(array.sharding.spec) if axis) or "-"
        rows.append((name, " x ".join(map(str, spec.shape)), f"{spec.size:,}", axes.replace("'", ""), spec.role))
    texts = "name", "shape", "sharded over", "role"
    table = fitted_table(console, ("name", "shape", "elements", *texts[2:]), rows, texts=texts)
    table.title = "Parameters"
    return table
