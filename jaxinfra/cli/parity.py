"""`python -m launch parity`: compares loss and gradients of small models on every mesh with those on one device."""

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from jaxinfra.bench import PARITY_CONFIGS
from jaxinfra.bench.parity import TOLERANCE, MeshDifference, compare_in_processes, load_text_run
from jaxinfra.errors import ConfigError
from jaxinfra.runtime import emulation
from jaxinfra.storage import outputs

BEGIN, END = "<!-- parity: begin -->", "<!-- parity: end -->"  # `--write` replaces what stands between them


def markdown_table(differences: Iterable[MeshDifference]) -> str:
    """Formats a Markdown table with one line per mesh and three columns per model."""
    by_mesh = {(row.mesh, row.config): row for row in differences}
    configs = sorted({config for _, config in by_mesh})
    head = ["mesh", *(f"{config}: {what}" for config in configs for what in ("loss", "gradients", "other order"))]
    lines = [head, ["---"] * len(head)]
    for mesh in sorted({mesh for mesh, _ in by_mesh}):
        line = [mesh]
        for config in configs:
            row = by_mesh.get((mesh, config))
            line += [f"{value:.1e}" for value in (row.loss, row.gradient, row.permuted)] if row else [""] * 3
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def insert_table(page: Path, table: str) -> str:
    """Returns the page with the table between its markers; ConfigError if it has none, StorageError if unreadable."""
    before, begin, rest = outputs.read_text(page).partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"{page}: has no place for the table; put {BEGIN} and {END} on lines of their own")
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Prints each row when it is done; raises ConfigError if a mesh differs by more than the tolerance."""
    overrides = [word for word in options.words if "=" in word]
    configs = [word for word in options.words if "=" not in word] or PARITY_CONFIGS
    # Errors in options and configs show before the long work.
    if options.write is not None:
        outputs.check_writable(options.write)
        insert_table(options.write, "")
    for config in configs:
        load_text_run(config, overrides)
    if options.devices is None:
        os.environ |= emulation.emulation_env(8)
    rows: list[MeshDifference] = []
    for row in compare_in_processes(configs, overrides, options.jobs):
        rows.append(row)
        print(
            f"{row.config:14} {row.mesh:32} loss {row.loss:.1e}  gradients {row.gradient:.1e} ({row.parameter})"
            f"  other order {row.permuted:.1e}{'' if row.worst <= TOLERANCE else '  TOO LARGE'}",
            flush=True,
        )
    failed = [row for row in rows if not row.worst <= TOLERANCE]  # not `>`, because NaN must fail
    num_meshes = len({row.mesh for row in rows})
    print(f"{len(rows)} rows, {num_meshes} meshes, {len(failed)} beyond {TOLERANCE:g}", file=sys.stderr)
    if options.write:
        outputs.write_text(options.write, insert_table(options.write, markdown_table(rows)))
    if failed:
        first = failed[0]
        raise ConfigError(
            f"{first.config} on {first.mesh}: differs by {first.worst:.1e}, must be at most {TOLERANCE:g}"
        )
    return 0
