"""`python -m launch bench llama`: compiles Llama 3.1 8B for 64 TPU v5p chips and compares it with other results.

Nothing is timed: temporaries and cycles are estimates of the TPU compiler (see docs/compile.md).
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version

from jaxinfra.config import load
from jaxinfra.errors import ConfigError
from jaxinfra.machine.chips import GIB
from jaxinfra.plan.aot import CompiledStep, compile_step
from jaxinfra.plan.compile_errors import TOO_LARGE
from jaxinfra.plan.topology import parse_topology
from jaxinfra.run import Run
from tests.bench import merge_overrides
from tests.bench.table import BenchmarkResult, Columns, TableRow, format_table

TOPOLOGY = parse_topology("v5p:4x4x4")
CONFIG = "configs/llama3_8b.py"
BATCH_SIZES = (1, 2, 4)  # sequences per chip and step
DOTS_BATCH_SIZES = (2,)  # where `OTHERS` has a row with the remat policy "dots"
# From the least recomputation to the most.
REMAT_POLICIES = ("weights", "dots_and_attention", "dots", "(dots,dots,dots,full)", "(dots,full)", "full")

COLUMNS: Columns = {
    "name": ("step", ""),
    "batch_size": ("sequences per chip", "{}"),
    "remat": ("remat", ""),
    "arguments_gib": ("arguments", "{:.2f} GiB"),
    "temporaries_gib": ("temporaries", "{:.2f} GiB"),
    "temp_size_gib": ("`temp_size_in_bytes`", "{:.2f} GiB"),
    "gcycles": ("Gcycles per sequence", "{:.3f}"),
    "attention": ("attention forward passes", "{}"),  # their cycles are not estimated
}

OTHERS: tuple[TableRow, ...] = tuple(
    {"name": name, "batch_size": batch_size, "remat": remat, "temporaries_gib": gib, "gcycles": gcycles}
    for name, batch_size, remat, gib, gcycles in (
        ("MaxText 0.2.5", 4, "full", "35.3 GiB", "2.49"),
        ("plain JAX step", 1, "full", "6.9 GiB", "2.46"),
        ("plain JAX step", 2, "full", "11.4 GiB", "2.46"),
        ("plain JAX step", 2, "dots", "52.6 GiB", "2.25"),
    )
)
"""Numbers from outside this project, for the same model and topology, with splash attention in blocks of 512."""


def _compile(batch_size: int, policy: str, overrides: Sequence[str]) -> CompiledStep:
    batch = f"train.global_batch={TOPOLOGY.num_devices * batch_size}"
    overrides = merge_overrides([batch, f"model.remat={policy}", *overrides])
    print(f"compiling {' '.join(overrides)} ...", file=sys.stderr, flush=True)
    return compile_step(load(CONFIG, overrides, root=Run).run, TOPOLOGY)


def _row(part: str, batch_size: int, policy: str, compiled: CompiledStep) -> TableRow:
    assert compiled.cycles is not None, compiled.topology
    return {
        "part": part,
        "batch_size": batch_size,
        "remat": policy,
        "arguments_gib": compiled.memory.arguments / GIB,
        "temporaries_gib": compiled.memory.temporaries / GIB,
        "temp_size_gib": compiled.memory.temp_size / GIB,
        "gcycles": compiled.cycles / batch_size / 1e9,
        "attention": sum(kernel.runs for kernel in compiled.kernels if "fwd" in kernel.name),
    }


def full(overrides: Sequence[str]) -> Iterator[TableRow]:
    """Saves only the input of every layer."""
    for batch_size in BATCH_SIZES:
        yield _row("full", batch_size, "full", _compile(batch_size, "full", overrides))


def dots(overrides: Sequence[str]) -> Iterator[TableRow]:
    """Saves the matmuls with weights, for the batch sizes that `OTHERS` has, too."""
    for batch_size in DOTS_BATCH_SIZES:
        yield _row("dots", batch_size, "dots", _compile(batch_size, "dots", overrides))


def best(overrides: Sequence[str]) -> Iterator[TableRow]:
    """Chooses for each batch size the policy with the least recomputation that fits the chip."""
    for batch_size in BATCH_SIZES:
        for policy in REMAT_POLICIES:
            try:
                compiled = _compile(batch_size, policy, overrides)
            except ConfigError as error:
                if TOO_LARGE not in str(error):
                    raise
                continue
            if compiled.memory.total <= TOPOLOGY.chip.hbm_bytes:
                yield _row("best", batch_size, policy, compiled)
                break


CASES = {"full": full, "dots": dots, "best": best}


def run(options: argparse.Namespace) -> BenchmarkResult:
    """Compiles the parts that `--only` names, or all."""
    rows = [row for part in options.only or CASES for row in CASES[part](options.overrides)]
    all_rows = [*({**row, "name": "jaxinfra"} for row in rows), *OTHERS]
    return BenchmarkResult(
        text=format_table(COLUMNS, [row for n in BATCH_SIZES for row in all_rows if row["batch_size"] == n]),
        note=f"{CONFIG} on {TOPOLOGY}",
        measurements={"rows": rows},
        environment={name: version(name) for name in ("jax", "libtpu")},
    )
