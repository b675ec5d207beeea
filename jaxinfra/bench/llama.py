"""`python -m launch bench llama`: the Llama 3.1 8B step on 64 TPU v5p chips, compiled, beside what others compile to.

Nothing is timed: temporaries and cycles are the TPU compiler's (see `plan.aot`, and where they lie in
docs/compile.md). "best" is the policy of rematerialisation that computes least again of those that fit a chip.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version

from jaxinfra.bench import last
from jaxinfra.bench.table import Columns, Findings, Row, table
from jaxinfra.config import load
from jaxinfra.errors import ConfigError
from jaxinfra.plan.aot import CompiledStep, compile_step
from jaxinfra.plan.compile_errors import TOO_LARGE
from jaxinfra.plan.topology import parse_topology
from jaxinfra.run import Run

ON = "v5p:4x4x4"
CHIPS = 64
CONFIG = "configs/llama3_8b.py"
SEQUENCES = (1, 2, 4)
"""Sequences a chip takes in a step."""

POLICIES = ("weights", "dots_and_attention", "dots", "(dots,dots,dots,full)", "(dots,full)", "full")
"""From what computes least again to what computes most."""

GIB = 2**30

COLUMNS: Columns = {
    "name": ("step", str),
    "sequences": ("sequences a chip", str),
    "remat": ("remat", str),
    "arguments_gib": ("arguments", "{:.2f} GiB".format),  # train state and batch of one chip
    "temporaries_gib": ("temporaries", lambda gib: gib if isinstance(gib, str) else f"{gib:.2f} GiB"),
    "temp_size_gib": ("`temp_size_in_bytes`", "{:.2f} GiB".format),  # the same as JAX calls it
    "cycles": ("cycles a sequence", lambda cycles: cycles if isinstance(cycles, str) else f"{cycles / 1e9:.3f}e9"),
    "attention": ("forward kernels", str),  # of attention, runs in a step: their cycles are not known
}

OTHERS: tuple[Row, ...] = tuple(
    dict.fromkeys(COLUMNS) | {"name": name, "sequences": n, "remat": remat, "temporaries_gib": gib, "cycles": cycles}
    for name, n, remat, gib, cycles in (
        ("MaxText 0.2.5", 4, "full", "35.3 GiB", "2.49e9"),
        ("bare JAX step", 1, "full", "6.9 GiB", "2.46e9"),
        ("bare JAX step", 2, "full", "11.4 GiB", "2.46e9"),
        ("bare JAX step", 2, "dots", "52.6 GiB", "2.25e9"),
    )
)
"""Figures given to this project, not produced by it: the same topology and model, splash attention in blocks of 512."""


def _compiled(sequences: int, policy: str, overrides: Sequence[str]) -> CompiledStep:
    changes = [f"train.global_batch={CHIPS * sequences}", f"model.remat={policy}", *overrides]
    print(f"compiling {' '.join(last(changes))} ...", file=sys.stderr, flush=True)
    return compile_step(load(CONFIG, last(changes), root=Run).run, parse_topology(ON), on_progress=lambda line: None)


def _row(part: str, sequences: int, policy: str, found: CompiledStep) -> Row:
    assert found.cycles is not None, found.topology
    return {
        "part": part,
        "sequences": sequences,
        "remat": policy,
        "arguments_gib": found.memory.arguments / GIB,
        "temporaries_gib": found.memory.temporaries / GIB,
        "temp_size_gib": found.memory.temp_size / GIB,
        "cycles": found.cycles / sequences,
        "attention": sum(kernel.runs for kernel in found.kernels if "fwd" in kernel.name),
    }


def full(overrides: Sequence[str]) -> Iterator[Row]:
    """Only the input of every layer is kept."""
    for sequences in SEQUENCES:
        yield _row("full", sequences, "full", _compiled(sequences, "full", overrides))


def dots(overrides: Sequence[str]) -> Iterator[Row]:
    """Products with weights are kept, where others have done so."""
    for sequences in sorted({other["sequences"] for other in OTHERS if other["remat"] == "dots"}):
        yield _row("dots", sequences, "dots", _compiled(sequences, "dots", overrides))


def best(overrides: Sequence[str]) -> Iterator[Row]:
    """Picks, among the policies that fit, the one that recomputes least."""
    hbm_bytes = parse_topology(ON).chip.hbm_bytes
    for sequences in SEQUENCES:
        for policy in POLICIES:
            try:
                found = _compiled(sequences, policy, overrides)
            except ConfigError as refused:
                if TOO_LARGE not in str(refused):
                    raise
                continue
            if found.memory.total <= hbm_bytes:
                yield _row("best", sequences, policy, found)
                break


CASES = {"full": full, "dots": dots, "best": best}


def run(options: argparse.Namespace) -> Findings:
    """Compiles the chosen parts, or all; the table has others after ours of as many sequences."""
    rows = [row for part in options.only or CASES for row in CASES[part](options.overrides)]
    shown = [*({**row, "name": "jaxinfra"} for row in rows), *OTHERS]
    return Findings(
        text=table(COLUMNS, [row for each in SEQUENCES for row in shown if row["sequences"] == each]),
        note=f"{CONFIG} on {ON}",
        figures={"rows": rows},
        facts={name: version(name) for name in ("jax", "libtpu")},
    )
