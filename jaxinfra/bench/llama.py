"""`python -m launch bench llama`: the Llama 3.1 8B step on 64 TPU v5p chips, compiled, beside what others compile to.

Nothing is timed: temporaries and cycles are the TPU compiler's (see `plan.compiled`, and where they lie in
docs/compile.md). "best" is the policy of rematerialisation that computes least again of those that fit a chip.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version

from jaxinfra.bench.table import Findings, table
from jaxinfra.config import load
from jaxinfra.errors import ConfigError
from jaxinfra.plan.compiled import Compiled, compile_step
from jaxinfra.plan.topology import parse
from jaxinfra.run import Run

ON = "v5p:4x4x4"
CHIPS = 64
CONFIG = "configs/llama3_8b.py"
SEQUENCES = (1, 2, 4)
"""Of a chip and step."""

POLICIES = ("weights", "dots_and_attention", "dots", "(dots,dots,dots,full)", "(dots,full)", "full")
"""From what computes least again to what computes most."""

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Other:
    """What another implementation of the same step compiles to.

    Attributes:
        name: of it.
        sequences: of a chip and step.
        remat: what it keeps.
        temporaries_gib: of one chip.
        cycles: of one sequence.
    """

    name: str
    sequences: int
    remat: str
    temporaries_gib: float
    cycles: float


OTHERS = (
    Other(name="MaxText 0.2.5", sequences=4, remat="full", temporaries_gib=35.3, cycles=2.49e9),
    Other(name="bare JAX step", sequences=1, remat="full", temporaries_gib=6.9, cycles=2.46e9),
    Other(name="bare JAX step", sequences=2, remat="full", temporaries_gib=11.4, cycles=2.46e9),
    Other(name="bare JAX step", sequences=2, remat="dots", temporaries_gib=52.6, cycles=2.25e9),
)
"""Figures given to this project, not produced by it: the same topology and model, splash attention in blocks of 512."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        part: "full", "dots" or "best".
        sequences: of a chip and step.
        remat: the policy.
        arguments_gib: train state and batch of one chip.
        temporaries_gib: of one chip.
        temp_size_gib: the same as JAX calls it, see `plan.compiled.Memory`.
        cycles: of one sequence.
        attention: how often the forward kernel of attention runs in a step; its cycles are not known.
    """

    part: str
    sequences: int
    remat: str
    arguments_gib: float
    temporaries_gib: float
    temp_size_gib: float
    cycles: float
    attention: int


def _compiled(sequences: int, policy: str, overrides: Sequence[str]) -> Compiled:
    changes = [f"train.global_batch={CHIPS * sequences}", f"model.remat={policy}", *overrides]
    changes = list({change.partition("=")[0]: change for change in changes}.values())
    print(f"compiling {' '.join(changes)} ...", file=sys.stderr, flush=True)
    return compile_step(load(CONFIG, changes, root=Run).run, parse(ON), report=lambda line: None)


def _row(part: str, sequences: int, policy: str, found: Compiled) -> Row:
    assert found.cycles is not None, found.on
    return Row(
        part=part,
        sequences=sequences,
        remat=policy,
        arguments_gib=found.memory.arguments / GIB,
        temporaries_gib=found.memory.temporaries / GIB,
        temp_size_gib=found.memory.temp_size / GIB,
        cycles=found.cycles / sequences,
        attention=sum(kernel.runs for kernel in found.kernels if "fwd" in kernel.name),
    )


def full(overrides: Sequence[str]) -> Iterator[Row]:
    """Only the input of every layer is kept."""
    for sequences in SEQUENCES:
        yield _row("full", sequences, "full", _compiled(sequences, "full", overrides))


def dots(overrides: Sequence[str]) -> Iterator[Row]:
    """Products with weights are kept, where others have done so."""
    for sequences in sorted({other.sequences for other in OTHERS if other.remat == "dots"}):
        yield _row("dots", sequences, "dots", _compiled(sequences, "dots", overrides))


def best(overrides: Sequence[str]) -> Iterator[Row]:
    """Of the policies that fit the one that computes least again."""
    hbm_bytes = parse(ON).chip.hbm_bytes
    for sequences in SEQUENCES:
        for policy in POLICIES:
            try:
                found = _compiled(sequences, policy, overrides)
            except ConfigError as refused:
                if "GiB too much" not in str(refused):
                    raise
                continue
            if found.memory.total <= hbm_bytes:
                yield _row("best", sequences, policy, found)
                break


CASES = {"full": full, "dots": dots, "best": best}


def cells_of(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The table, others after ours of as many sequences."""
    head = (
        "step",
        "sequences a chip",
        "remat",
        "arguments",
        "temporaries",
        "`temp_size_in_bytes`",
        "cycles a sequence",
    )
    cells: list[tuple[str, ...]] = [(*head, "forward kernels")]
    for sequences in SEQUENCES:
        for row in rows:
            if row.sequences == sequences:
                sizes = [f"{gib:.2f} GiB" for gib in (row.arguments_gib, row.temporaries_gib, row.temp_size_gib)]
                figures = (*sizes, f"{row.cycles / 1e9:.3f}e9", str(row.attention))
                cells.append(("jaxinfra", str(sequences), row.remat, *figures))
        for other in OTHERS:
            if other.sequences == sequences:
                figures = (f"{other.temporaries_gib:.1f} GiB", "", f"{other.cycles / 1e9:.2f}e9", "")
                cells.append((other.name, str(sequences), other.remat, "", *figures))
    return cells


def run(options: argparse.Namespace) -> Findings:
    """Compiles the chosen parts, or all."""
    rows = [row for part in options.only or CASES for row in CASES[part](options.overrides)]
    return Findings(
        text=table(cells_of(rows)),
        note=f"{CONFIG} on {ON}",
        figures={"rows": [dataclasses.asdict(row) for row in rows]},
        facts={name: version(name) for name in ("jax", "libtpu")},
    )
