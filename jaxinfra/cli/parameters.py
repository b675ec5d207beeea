"""The table of parameters that `show` prints."""

import jax
from rich import box
from rich.table import Table

from jaxinfra.program import Program


def parameter_table(program: Program) -> Table:
    """Name, shape, sharding and role of every parameter."""
    table = Table(box=box.SIMPLE_HEAD, title="Parameters", title_justify="left", title_style="bold")
    for column in ("name", "shape", "sharded over", "role"):
        table.add_column(column)
    table.add_column("elements", justify="right")
    arrays = jax.tree.leaves(program.params)
    for (path, spec), array in zip(jax.tree.leaves_with_path(program.specs), arrays, strict=True):
        name = ".".join(str(key.key) for key in path)
        axes = ", ".join(f"{dim}:{part}" for dim, part in enumerate(array.sharding.spec) if part) or "-"
        table.add_row(name, " x ".join(map(str, spec.shape)), axes.replace("'", ""), spec.role, f"{spec.size:,}")
    return table
