"""`python -m launch bench parallel`: the step on each mesh axis and pipeline schedule, against the plain form.

Eight emulated devices share the cores of this machine, so a ratio says how much more work a form is, bubbles and
recomputation included, and what its collectives copy; not how fast links are. Both sides step in turns A B A B in one
process; a ratio is the median of those of the pairs.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from statistics import median

from jaxinfra.bench.children import Request, measured
from jaxinfra.bench.table import Findings, machine, table
from jaxinfra.parallel.schedules import BACKWARD, FORWARD, PipelineConfig

DEVICES = 8
PLAIN = ("mesh.fsdp=8",)
MICROBATCHES = 8
STAGES = ("mesh.stage=4", "mesh.fsdp=2")
SIZE = ("data.seq_len=128", "train.global_batch=64", "model.layers=8", "model.remat=full")
"""Rows enough for eight microbatches on every mesh, layers enough for two chunks on each of four stages."""
AXES = ("replica=8", "fsdp=4 tensor=2", "tensor=8", "fsdp=4 context=2", "context=8", "fsdp=4 stage=2")
EXPERTS = ("replica=8", "fsdp=4 expert=2", "expert=8", "expert=4 tensor=2")
SCHEDULES = (
    PipelineConfig(schedule="gpipe"),
    PipelineConfig(schedule="1f1b"),
    PipelineConfig(schedule="interleaved", chunks=2),
    PipelineConfig(schedule="zero_bubble"),
)
MOE = "configs/parity_moe.py"
"""The model of `experts`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        case: mesh and schedule.
        step_ms: median time of a step.
        plain_ms: that of the plain form, measured in turns with it.
        ratio: median of the ratios of pairs.
        formula: the ratio that the schedule alone makes, where there is one.
    """

    case: str
    step_ms: float
    plain_ms: float
    ratio: float
    formula: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scope:
    """What is asked for on the command line."""

    config: str
    overrides: tuple[str, ...]
    pairs: int

    def row(
        self,
        case: str,
        mesh: Sequence[str],
        plain: Sequence[str],
        config: str | None = None,
        formula: float | None = None,
    ) -> Row:
        """Both sides, measured in a process of their own."""
        sizes = () if config else SIZE
        request = Request(
            kind="meshes",
            config=config or self.config,
            overrides=_last((*sizes, *self.overrides, *mesh)),
            plain=_last((*sizes, *self.overrides, *plain)),
            pairs=self.pairs,
        )
        times_s = measured(request, DEVICES)
        step_s, plain_s = times_s["mesh"], times_s["plain"]
        ratio = median(a / b for a, b in zip(step_s, plain_s, strict=True))
        return Row(
            case=case, step_ms=1e3 * median(step_s), plain_ms=1e3 * median(plain_s), ratio=ratio, formula=formula
        )


def _last(overrides: Sequence[str]) -> list[str]:
    """Of changes to one field the last."""
    return list({change.partition("=")[0]: change for change in overrides}.values())


def _mesh(sizes: str) -> tuple[str, ...]:
    return ("mesh.fsdp=1", *(f"mesh.{size}" for size in sizes.split()))


def axes(scope: Scope) -> Iterator[Row]:
    """A dense model, one axis after the other; stages with as many microbatches as the plain form."""
    for sizes in AXES:
        accumulate = ("train.accumulate=4",) if "stage" in sizes else ()
        yield scope.row(sizes, (*_mesh(sizes), *accumulate), (*PLAIN, *accumulate))


def experts(scope: Scope) -> Iterator[Row]:
    """A mixture of experts."""
    for sizes in EXPERTS:
        yield scope.row(f"experts: {sizes}", _mesh(sizes), PLAIN, config=MOE)


def schedules(scope: Scope) -> Iterator[Row]:
    """Four stages by two, eight microbatches: what a schedule costs is its time over that of its work alone."""
    accumulate = f"train.accumulate={MICROBATCHES}"
    for pipeline in SCHEDULES:
        formula = pipeline.table(4, MICROBATCHES).time / ((FORWARD + BACKWARD) * MICROBATCHES)
        chosen = (f"pipeline.schedule={pipeline.schedule}", f"pipeline.chunks={pipeline.chunks}")
        case = f"stage=4 fsdp=2, {MICROBATCHES} microbatches, {pipeline.schedule}"
        yield scope.row(case, (*STAGES, accumulate, *chosen), (*PLAIN, accumulate), formula=formula)


CASES = {"axes": axes, "experts": experts, "schedules": schedules}


def run(options: argparse.Namespace) -> Findings:
    """Measures the chosen parts, or all."""
    scope = Scope(config=options.config, overrides=tuple(options.overrides), pairs=options.pairs)
    rows: list[Row] = []
    for name in options.only or CASES:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        rows += CASES[name](scope)
    cells = [("case", "step", "fsdp=8", "ratio", "by the formula")]
    for row in rows:
        formula = "" if row.formula is None else f"{row.formula:.3f}"
        cells.append((row.case, f"{row.step_ms:.1f} ms", f"{row.plain_ms:.1f} ms", f"{row.ratio:.3f}", formula))
    return Findings(
        text=table(cells),
        note=f"Medians of {scope.pairs} pairs in turns",
        figures={"rows": [dataclasses.asdict(row) for row in rows], "pairs": scope.pairs},
        facts=machine(),
    )
