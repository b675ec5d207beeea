"""`python -m launch bench parallel`: times every mesh axis and pipeline schedule against plain FSDP.

The eight devices are emulated on the cores of this machine. A ratio shows the additional work of a mesh (pipeline
bubbles, recomputation, copies in collectives), but not the speed of links.
"""

import argparse
from collections.abc import Iterator, Sequence
from statistics import median

from jaxinfra.machine.emulation import emulation_env
from jaxinfra.parallel.schedules import BACKWARD_COST, FORWARD_COST, PipelineConfig
from tests.bench import merge_overrides
from tests.bench.commands import call_in_process
from tests.bench.measure import time_runs
from tests.bench.table import Cases, Columns, TableRow, median_ratio

NUM_DEVICES = 8
MICROBATCHES = 8
# Enough samples for eight microbatches on every mesh; enough layers for two virtual stages on each of four stages.
DENSE_MODEL = ("data.seq_len=128", "train.global_batch=64", "model.num_layers=8", "model.remat=full")
MOE_CONFIG = "configs/parity_moe.py"
DENSE_MESHES = ("replica=8", "fsdp=4 tensor=2", "tensor=8", "fsdp=4 context=2", "context=8", "fsdp=4 stage=2")
MOE_MESHES = ("replica=8", "fsdp=4 expert=2", "expert=8", "expert=4 tensor=2")
SCHEDULES = (
    PipelineConfig(schedule="gpipe"),
    PipelineConfig(schedule="1f1b"),
    PipelineConfig(schedule="interleaved", chunks=2),
    PipelineConfig(schedule="zero_bubble"),
)

COLUMNS: Columns = {
    "case": ("case", ""),
    "step_ms": ("step", "{:.1f} ms"),
    "fsdp_ms": ("fsdp=8", "{:.1f} ms"),
    "ratio": ("ratio", "{:.3f}"),
    "expected": ("expected ratio", "{:.3f}"),
}


def _row(
    options: argparse.Namespace,
    case: str,
    mesh: Sequence[str],
    *shared: str,
    config: str | None = None,
    expected: float | None = None,
) -> TableRow:
    """Times a mesh and FSDP in one process; both have the overrides `shared`."""
    model = () if config else DENSE_MODEL
    sides = {
        "mesh": merge_overrides((*model, *options.overrides, *mesh, *shared)),
        "fsdp": merge_overrides((*model, *options.overrides, "mesh.fsdp=8", *shared)),
    }
    times_s = call_in_process(time_runs, emulation_env(NUM_DEVICES), config or options.config, sides, options.pairs)
    return {
        "case": case,
        "step_ms": 1e3 * median(times_s["mesh"]),
        "fsdp_ms": 1e3 * median(times_s["fsdp"]),
        "ratio": median_ratio(times_s["mesh"], times_s["fsdp"]),
        "expected": expected,
    }


def _mesh(sizes: str) -> tuple[str, ...]:
    return ("mesh.fsdp=1", *(f"mesh.{size}" for size in sizes.split()))


def axes(options: argparse.Namespace) -> Iterator[TableRow]:
    """Times a dense model on each mesh axis."""
    for sizes in DENSE_MESHES:
        yield _row(options, sizes, _mesh(sizes), *(["train.accumulate=4"] if "stage" in sizes else []))


def experts(options: argparse.Namespace) -> Iterator[TableRow]:
    """Times a mixture of experts."""
    for sizes in MOE_MESHES:
        yield _row(options, f"experts: {sizes}", _mesh(sizes), config=MOE_CONFIG)


def schedules(options: argparse.Namespace) -> Iterator[TableRow]:
    """Times each pipeline schedule on four stages.

    The expected ratio is the length of the schedule over its length without bubbles and recomputation.
    """
    for pipeline in SCHEDULES:
        expected = pipeline.make_schedule(4, MICROBATCHES).total_cost / ((FORWARD_COST + BACKWARD_COST) * MICROBATCHES)
        schedule = (f"pipeline.schedule={pipeline.schedule}", f"pipeline.chunks={pipeline.chunks}")
        case = f"stage=4 fsdp=2, {MICROBATCHES} microbatches, {pipeline.schedule}"
        mesh = ("mesh.stage=4", "mesh.fsdp=2", *schedule)
        yield _row(options, case, mesh, f"train.accumulate={MICROBATCHES}", expected=expected)


CASES: Cases = {"axes": axes, "experts": experts, "schedules": schedules}
