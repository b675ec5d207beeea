"""`python -m launch parity`: loss and every gradient of small models on every mesh, against one device."""

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

from jaxinfra.bench import PARITY_CONFIGS
from jaxinfra.bench.parity import TOLERANCE, MeshDifference, compare_in_processes, load_text_run
from jaxinfra.errors import ConfigError
from jaxinfra.runtime import emulation
from jaxinfra.storage import outputs

BEGIN, END = "<!-- parity: begin -->", "<!-- parity: end -->"  # marks around the table on the page that `--write` names


def markdown_table(found: Iterable[MeshDifference]) -> str:
    """The rows in Markdown, one line a mesh with all its models."""
    rows = {(row.mesh, row.config): row for row in found}
    configs = sorted({config for _, config in rows})
    head = ["mesh", *(f"{config}: {what}" for config in configs for what in ("loss", "gradients", "other order"))]
    lines = [head, ["---"] * len(head)]
    for mesh in sorted({mesh for mesh, _ in rows}):
        of_mesh = (rows.get((mesh, config)) for config in configs)
        cells = ([f"{d:.1e}" for d in (row.loss, row.gradient, row.permuted)] if row else [""] * 3 for row in of_mesh)
        lines.append([mesh, *chain.from_iterable(cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def insert_table(page: Path, text: str) -> str:
    """A page with the table between its marks; ConfigError where it has none, StorageError where it cannot be read."""
    before, found, rest = outputs.read_text(page).partition(BEGIN)
    _, end, after = rest.partition(END)
    if not found or not end:
        raise ConfigError(f"{page}: no place for the table; put {BEGIN} and {END} on lines of their own")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Prints the table as its rows come, and says whether all are within the bound."""
    overrides = [word for word in options.words if "=" in word]
    configs = [word for word in options.words if "=" not in word] or PARITY_CONFIGS
    if options.write is not None:
        outputs.check_writable(options.write)
        insert_table(options.write, "")
    for config in configs:
        load_text_run(config, overrides)
    if options.devices is None:
        os.environ |= emulation.emulation_env(8)
    found: list[MeshDifference] = []
    for row in compare_in_processes(configs, overrides, options.jobs):
        found.append(row)
        print(
            f"{row.config:14} {row.mesh:32} loss {row.loss:.1e}  gradients {row.gradient:.1e} ({row.parameter})"
            f"  other order {row.permuted:.1e}{'' if row.worst <= TOLERANCE else '  TOO FAR'}",
            flush=True,
        )
    far = [row for row in found if not row.worst <= TOLERANCE]
    print(
        f"{len(found)} rows, {len({row.mesh for row in found})} meshes, {len(far)} beyond {TOLERANCE:g}",
        file=sys.stderr,
    )
    if options.write:
        outputs.write_text(options.write, insert_table(options.write, markdown_table(found)))
    if far:
        raise ConfigError(
            f"{far[0].config} on {far[0].mesh}: differs by {far[0].worst:.1e}, expected {TOLERANCE:g} or less"
        )
    return 0
