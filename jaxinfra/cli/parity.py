"""`python -m launch parity`: compares loss and gradients of small models on every mesh with those on one device."""

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence

from jaxinfra.cli.markdown import insert_table
from jaxinfra.errors import ConfigError
from jaxinfra.machine import emulation, platforms
from jaxinfra.parity import PARITY_CONFIGS, processes
from jaxinfra.parity.meshes import TOLERANCE, MeshDifference, compare_in_processes, compare_joined, load_text_run
from jaxinfra.processes.peers import current_peers
from jaxinfra.storage import outputs


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


def compare(options: argparse.Namespace, configs: Sequence[str], overrides: Sequence[str]) -> Iterator[MeshDifference]:
    """Yields the rows: of this process and of several that it starts, or of the ones that it is one of."""
    if current_peers().count > 1:
        yield from compare_joined(configs, overrides)
        return
    if options.devices is None:
        os.environ |= emulation.emulation_env(8)
    yield from compare_in_processes(configs, overrides, options.jobs)
    if platforms.default_platform() == "tpu":
        print("one process drives all TPU chips of a host: no rows of several processes", file=sys.stderr)
    else:
        yield from processes.compare_layouts(configs, overrides, options.devices)


def is_too_large(row: MeshDifference) -> bool:
    """Whether a difference is beyond its tolerance; a NaN is, too."""
    return not (row.worst <= TOLERANCE and max(row.loss, row.gradient) <= _tolerance(row))


def _tolerance(row: MeshDifference) -> float:
    """Returns the largest difference of loss and gradients; several processes ("fsdp=8, 2 x 4") may differ less."""
    return processes.TOLERANCE if " x " in row.mesh else TOLERANCE


def run(options: argparse.Namespace) -> None:
    """Prints each row when it is done; raises ConfigError if a mesh differs by more than the tolerance."""
    overrides = [word for word in options.words if "=" in word]
    configs = [word for word in options.words if "=" not in word] or PARITY_CONFIGS
    # Errors in options and configs show before the long work.
    if options.write is not None and options.prints:
        outputs.check_writable(options.write)
        insert_table(options.write, "parity", "")
    for config in configs:
        load_text_run(config, overrides)
    rows: list[MeshDifference] = []
    for row in compare(options, configs, overrides):
        rows.append(row)
        if options.prints:
            print(
                f"{row.config:14} {row.mesh:32} loss {row.loss:.1e}  gradients {row.gradient:.1e} ({row.parameter})"
                f"  other order {row.permuted:.1e}{'  TOO LARGE' if is_too_large(row) else ''}",
                flush=True,
            )
    failed = [row for row in rows if is_too_large(row)]
    num_meshes = len({row.mesh for row in rows})
    if options.prints:
        print(f"{len(rows)} rows, {num_meshes} meshes, {len(failed)} beyond {TOLERANCE:g}", file=sys.stderr)
        if options.write:
            outputs.write_text(options.write, insert_table(options.write, "parity", markdown_table(rows)))
    if failed:
        first, most = failed[0], _tolerance(failed[0])
        raise ConfigError(f"{first.config} on {first.mesh}: differs by {first.worst:.1e}, must be at most {most:g}")
