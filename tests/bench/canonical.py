"""`python -m launch bench canonical`: what canonical mode costs on one mesh, against plain training on the same mesh.

Steps with and without `train.canonical` alternate in one process. Memory and bytes are those of the compiled programs.
The eight devices are emulated on the cores of this machine: a ratio shows additional work, but not the speed of links.
"""

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from statistics import median

from jaxinfra.machine.emulation import emulation_env
from jaxinfra.parity.meshes import make_program
from jaxinfra.plan.aot import memory_usage
from jaxinfra.plan.collectives import Traffic, find_collectives, summarize
from jaxinfra.plan.hlo import HloModule
from tests.bench import merge_overrides
from tests.bench.commands import Times, call_in_process
from tests.bench.measure import load_run, time_runs
from tests.bench.table import Cases, Columns, TableRow, median_ratio

NUM_DEVICES = 8
MESHES = {"fsdp": "mesh.fsdp=8", "replica": "mesh.replica=2 mesh.fsdp=4"}
SIDES = {"canonical": "train.canonical=8", "plain": "train.canonical=none"}

COLUMNS: Columns = {
    "case": ("mesh", ""),
    "canonical_ms": ("train.canonical=8", "{:.1f} ms"),
    "plain_ms": ("plain", "{:.1f} ms"),
    "ratio": ("ratio", "{:.3f}"),
    "canonical_memory": ("temporaries", "{:.1f} MiB"),
    "plain_memory": ("plain", "{:.1f} MiB"),
    "canonical_sent": ("sent by a device", "{:.1f} MiB"),
    "plain_sent": ("plain", "{:.1f} MiB"),
}

RECEIVED = {"all-reduce": 2.0}
"""Arrays that cross the links for one that is moved by a collective of this kind, around a ring; else 1."""


def sent_bytes(traffic: Sequence[Traffic], mesh: Mapping[str, int]) -> float:
    """Returns the bytes that a device sends in a step, if collectives go around rings."""
    total = 0.0
    for row in traffic:
        group = math.prod(mesh[axis] for axis in row.axes)
        total += RECEIVED.get(row.kind, 1.0) * row.bytes * (1 - 1 / group)
    return total


def measure(config: str, sides: Mapping[str, Sequence[str]], num_rounds: int) -> tuple[Times, dict[str, float]]:
    """Times both sides alternately; also returns the MiB of temporaries and of bytes sent of each, by column."""
    numbers = {}
    for side, overrides in sides.items():
        program = make_program(load_run(config, overrides))
        executable, mesh = program.lower().compile(), dict(program.mesh.shape)
        module = HloModule(executable.as_text() or "")
        numbers[f"{side}_memory"] = memory_usage(executable).temp_size / 2**20
        numbers[f"{side}_sent"] = sent_bytes(summarize(find_collectives(module, mesh)), mesh) / 2**20
    return time_runs(config, sides, num_rounds), numbers


def rows(options: argparse.Namespace, mesh: str) -> Iterator[TableRow]:
    """Measures one mesh."""
    shared = [*options.overrides, "mesh.fsdp=1", *mesh.split()]
    sides = {side: merge_overrides([*shared, override]) for side, override in SIDES.items()}
    times_s, numbers = call_in_process(measure, emulation_env(NUM_DEVICES), options.config, sides, options.pairs)
    yield {
        "case": mesh,
        "canonical_ms": 1e3 * median(times_s["canonical"]),
        "plain_ms": 1e3 * median(times_s["plain"]),
        "ratio": median_ratio(times_s["canonical"], times_s["plain"]),
        **numbers,
    }


CASES: Cases = {name: partial(rows, mesh=mesh) for name, mesh in MESHES.items()}
