"""`python -m launch show CONFIG`: prints the resolved config and its statistics; uses no devices."""

import argparse
import math

import jax
from rich.markup import escape
from rich.table import Column, Table

from jaxinfra.cli import config_argument
from jaxinfra.config import dump, validate
from jaxinfra.config.source import record_with_classes
from jaxinfra.optim.schedules import lr_table
from jaxinfra.parallel.mesh import abstract_mesh
from jaxinfra.parallel.schedules import format_schedule
from jaxinfra.parallel.spec import leaf_name
from jaxinfra.program import Program
from jaxinfra.run import with_mesh_size
from jaxinfra.track.console import statistics_table, stdout_console, titled_table
from jaxinfra.track.terminal_plot import plot_curve
from jaxinfra.train.statistics import run_statistics


def run(options: argparse.Namespace) -> None:
    """Prints the config; without --changed also its statistics, pipeline schedule, parameters and learning rate."""
    # The classes of a record are needed for the last three alone.
    if not (options.overrides or options.imports) and (record := record_with_classes(options.config)):
        for line in dump(record["config"]).splitlines():
            if not options.changed or line.partition(" = ")[0] in record.get("origins", {}):
                print(line)
        if not options.changed:
            stdout_console().print(statistics_table(record.get("derived", {})))
        return
    loaded = config_argument.load_config(options)
    validate(loaded.run)
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
    console.print(statistics_table(run_statistics(program)))
    if run.mesh.stage > 1:
        console.print("Pipeline: one column per tick, forward (F) and backward (B) of each microbatch", style="bold")
        for row in format_schedule(run.pipeline.make_schedule(run.mesh.stage, run.train.accumulate)):
            console.print(row, markup=False, soft_wrap=True)
    console.print(_parameter_table(program))
    optim, steps = run.optim, run.train.steps
    console.print(f"Learning rate over {steps:,} steps", style="bold")
    for step, rate in lr_table(optim.schedule, peak_lr=optim.peak_lr, steps=steps):
        console.print(f"{step:>12,}  {rate:.2e}")
    console.print(plot_curve(lr_table(optim.schedule, peak_lr=optim.peak_lr, steps=steps, rows=200)), markup=False)


def _parameter_table(program: Program) -> Table:
    """Lists the name, shape, sharding, role and size of every parameter."""
    name_column = Column("name", overflow="fold")  # a narrow terminal breaks long names, but shows them in full
    table = titled_table("Parameters", name_column, "shape", "sharded over", "role")
    table.add_column("elements", justify="right")
    arrays = jax.tree.leaves(program.params)
    for (path, spec), array in zip(jax.tree.leaves_with_path(program.specs), arrays, strict=True):
        name = leaf_name(path)
        axes = ", ".join(f"{dim}:{axis}" for dim, axis in enumerate(array.sharding.spec) if axis) or "-"
        table.add_row(name, " x ".join(map(str, spec.shape)), axes.replace("'", ""), spec.role, f"{spec.size:,}")
    return table
