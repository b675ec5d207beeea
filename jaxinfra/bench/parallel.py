"""`python -m launch bench parallel`: the step on each mesh axis and pipeline schedule, against the plain form.

Eight emulated devices share the cores of this machine, so a ratio says how much more work a form is, bubbles and
recomputation included, and what its collectives copy; not how fast links are. Both sides step in turns A B A B in one
process; a ratio is the median of those of the pairs.
"""

import argparse
from collections.abc import Iterator, Sequence
from statistics import median

from jaxinfra.bench import last
from jaxinfra.bench.children import asked
from jaxinfra.bench.table import Cases, Columns, Findings, Row, in_turns, ratio
from jaxinfra.parallel.schedules import BACKWARD_COST, FORWARD_COST, PipelineConfig

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


COLUMNS: Columns = {
    "case": ("case", str),
    "step_ms": ("step", "{:.1f} ms".format),
    "plain_ms": ("fsdp=8", "{:.1f} ms".format),  # in turns with the step
    "ratio": ("ratio", "{:.3f}".format),
    "formula": ("by the formula", "{:.3f}".format),  # the ratio that the schedule alone makes, where there is one
}


def _row(
    options: argparse.Namespace,
    case: str,
    mesh: Sequence[str],
    plain: Sequence[str],
    *,
    config: str | None = None,
    formula: float | None = None,
) -> Row:
    """Measures both sides in a process of their own."""
    changes = (*(() if config else SIZE), *options.overrides)
    request = {"kind": "meshes", "config": config or options.config, "pairs": options.pairs}
    sides = {"overrides": last((*changes, *mesh)), "plain": last((*changes, *plain))}
    times_s = asked("measure", DEVICES, **request, **sides)
    step_s, plain_s = times_s["mesh"], times_s["plain"]
    times_ms = {"step_ms": 1e3 * median(step_s), "plain_ms": 1e3 * median(plain_s)}
    return {"case": case, **times_ms, "ratio": ratio(step_s, plain_s), "formula": formula}


def _mesh(sizes: str) -> tuple[str, ...]:
    return ("mesh.fsdp=1", *(f"mesh.{size}" for size in sizes.split()))


def axes(options: argparse.Namespace) -> Iterator[Row]:
    """A dense model, one axis after the other; stages with as many microbatches as the plain form."""
    for sizes in AXES:
        accumulate = ("train.accumulate=4",) if "stage" in sizes else ()
        yield _row(options, sizes, (*_mesh(sizes), *accumulate), (*PLAIN, *accumulate))


def experts(options: argparse.Namespace) -> Iterator[Row]:
    """A mixture of experts."""
    for sizes in EXPERTS:
        yield _row(options, f"experts: {sizes}", _mesh(sizes), PLAIN, config=MOE)


def schedules(options: argparse.Namespace) -> Iterator[Row]:
    """Four stages by two, eight microbatches: what a schedule costs is its time over that of its work alone."""
    accumulate = f"train.accumulate={MICROBATCHES}"
    for pipeline in SCHEDULES:
        formula = pipeline.make_schedule(4, MICROBATCHES).total_cost / ((FORWARD_COST + BACKWARD_COST) * MICROBATCHES)
        chosen = (f"pipeline.schedule={pipeline.schedule}", f"pipeline.chunks={pipeline.chunks}")
        case = f"stage=4 fsdp=2, {MICROBATCHES} microbatches, {pipeline.schedule}"
        yield _row(options, case, (*STAGES, accumulate, *chosen), (*PLAIN, accumulate), formula=formula)


CASES: Cases = {"axes": axes, "experts": experts, "schedules": schedules}


def run(options: argparse.Namespace) -> Findings:
    """Measures the chosen parts, or all."""
    return in_turns(options, CASES, COLUMNS)
