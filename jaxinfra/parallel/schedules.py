"""Pipeline schedules as tables: the microbatch and chunk that each stage works on in each tick.

1F1B with three stages and three microbatches, a column per tick (F0: forward pass of microbatch 0, B0: its backward
pass):

    stage 0  F0  F1  F2     .      B0     B1  B2
    stage 1  .   F0  F1     F2 B0  B1     B2  .
    stage 2  .   .   F0 B0  F1 B1  F2 B2  .   .

A tick has up to three passes, in this order: a forward pass of one chunk, a backward pass of one chunk and, in
`zero_bubble`, the weight gradients of one chunk. The stages run as one program, so a pass costs its time on all stages
if any stage runs it. A chunk is a run of consecutive layers (Megatron's model chunk, or virtual stage). A stage holds
`chunks` of them: chunk c of stage s is number `c * stages + s` in the order of the model.

`PipelineConfig.make_schedule` builds the tables in NumPy; `parallel.pipeline` runs them. A stage uses what its neighbor
sends in the next tick, so only the inputs of chunks are saved, for the backward pass that recomputes the chunk. Each is
saved in a slot, which is free again after the chunk's last pass. Except in GPipe, the number of slots does not grow
with the microbatches.

Sources: GPipe (Huang et al. 2019); 1F1B (Narayanan et al. 2019, PipeDream; 2021, section 2.2), interleaved (same,
section 2.2.2); zero bubble, which splits the backward pass (Qi et al. 2023).
"""

import heapq
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from jaxinfra.config import Problem

type ScheduleName = Literal["gpipe", "1f1b", "interleaved", "zero_bubble"]

IDLE = -1
"""In a `PassTable`: the stage does not run the pass in this tick."""

# Costs, in forward passes. A backward pass recomputes the forward pass, then computes gradients of inputs and weights.
FORWARD_COST, BACKWARD_COST = 1.0, 3.0
# A split backward pass recomputes the forward pass in each half. The half for weights also computes the gradients of
# inputs again, which connect the layers of a chunk.
INPUT_GRAD_COST, WEIGHT_GRAD_COST = 2.0, 3.0


@dataclass(frozen=True, kw_only=True)
class PassTable:
    """One kind of pass over all ticks: int32 `[ticks, stages]` arrays, `IDLE` where a stage does not run it.

    Attributes:
        microbatch: index of the microbatch.
        chunk: index of the stage's chunk.
        slot: index of the slot that holds the input of the chunk.
    """

    microbatch: np.ndarray
    chunk: np.ndarray
    slot: np.ndarray

    @property
    def active(self) -> np.ndarray:
        """Whether a stage runs the pass, `[ticks, stages]`."""
        return self.microbatch != IDLE

    @property
    def any_active(self) -> np.ndarray:
        """Whether any stage runs the pass, `[ticks]`."""
        return self.active.any(axis=1)


@dataclass(frozen=True, kw_only=True)
class PipelineSchedule:
    """A schedule as one table for each kind of pass.

    Attributes:
        name: the kind of schedule.
        stages: number of stages.
        microbatches: number of microbatches.
        chunks: number of chunks per stage.
        forward: forward passes.
        backward: backward passes; gradients of inputs only if `weight_grad` is not None.
        weight_grad: gradients of weights, if they are a separate pass.
    """

    name: ScheduleName
    stages: int
    microbatches: int
    chunks: int
    forward: PassTable
    backward: PassTable
    weight_grad: PassTable | None = None

    @property
    def num_ticks(self) -> int:
        """Length of the table."""
        return len(self.forward.microbatch)

    @property
    def passes(self) -> tuple[PassTable, ...]:
        """The passes of a tick, in order."""
        return (self.forward, self.backward, *(() if self.weight_grad is None else (self.weight_grad,)))

    @property
    def costs(self) -> tuple[float, ...]:
        """The cost of each of `passes`, in forward passes of a chunk."""
        if self.weight_grad is None:
            return FORWARD_COST, BACKWARD_COST
        return FORWARD_COST, INPUT_GRAD_COST, WEIGHT_GRAD_COST

    @property
    def in_flight(self) -> tuple[int, ...]:
        """The most inputs that each stage saves at once."""
        return tuple(int(slots.max()) + 1 for slots in self.forward.slot.T)

    @property
    def num_slots(self) -> int:
        """The most inputs that any stage saves at once."""
        return max(self.in_flight)

    @property
    def total_cost(self) -> float:
        """Cost of the whole table, in forward passes of all layers of a stage."""
        ticks = [table.any_active.sum() for table in self.passes]
        return float(np.dot(ticks, self.costs)) / self.chunks

    @property
    def bubble(self) -> float:
        """The fraction of the time in which a stage idles; the same on every stage."""
        return 1.0 - sum(self.costs) * self.microbatches / self.total_cost


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """The schedule of microbatches over pipeline stages; `train.accumulate` is the number of microbatches.

    Attributes:
        schedule: `gpipe`, `1f1b`, `interleaved` (several chunks per stage: a smaller bubble, more transfers), or
            `zero_bubble` (separate weight gradients: faster only with very few microbatches).
        chunks: number of chunks per stage (virtual stages), for `interleaved`.
    """

    schedule: ScheduleName = "1f1b"
    chunks: int = 1

    def problems(self) -> Iterable[Problem]:
        """Yields a number of chunks that does not fit the schedule."""
        fields = ("schedule", "chunks")
        if self.schedule == "interleaved" and self.chunks < 2:
            yield Problem(fields=fields, message="needs at least 2 chunks per stage", fix="use pipeline.chunks=2")
        if self.schedule != "interleaved" and self.chunks != 1:
            fix = "use pipeline.schedule=interleaved, or pipeline.chunks=1"
            yield Problem(fields=fields, message="takes one chunk per stage", fix=fix)

    def make_schedule(self, stages: int, microbatches: int) -> PipelineSchedule:
        """Builds the tables of the schedule.

        An interleaved schedule has idle ticks if the microbatches are not a multiple of the stages.
        """
        name, chunks = self.schedule, self.chunks
        # The order in which a stage takes microbatches through its chunks: `stages` of them through the first chunk,
        # then through the second, and so on. For 2 stages, 4 microbatches and chunks a, b: 0a 1a 0b 1b 2a 3a 2b 3b.
        rounds = range(0, microbatches, stages)
        order = [(first + i, chunk) for first, chunk, i in itertools.product(rounds, range(chunks), range(stages))]
        # If the microbatches are not a multiple of the stages, some places in the order are empty.
        work = [(place, m, chunk) for place, (m, chunk) in enumerate(order) if m < microbatches]
        # The tick of the first backward pass, on the last stage: in GPipe after all forward passes, else in the tick of
        # the first output of the model. Backward passes use the order of forward passes, with the chunks reversed.
        first_backward = stages - 1 + (microbatches if name == "gpipe" else (chunks - 1) * stages)
        num_ticks, is_split = first_backward + work[-1][0] + stages, name == "zero_bubble"
        forward, backward, weight_grad = (_empty_table(num_ticks, stages) for _ in range(3))
        for place, m, chunk in work:
            # The tick in which the gradient reaches the first stage.
            last_backward = first_backward + place + stages - 1
            for stage in range(stages):
                _add_pass(forward, place + stage, stage, m, chunk)
                _add_pass(backward, last_backward - stage, stage, m, chunks - 1 - chunk)
                if is_split:  # on all stages in one tick, as a pass on one stage costs as much as on all
                    _add_pass(weight_grad, last_backward, stage, m, chunk)
        _assign_slots([forward, backward, weight_grad] if is_split else [forward, backward])
        return PipelineSchedule(
            name=name,
            stages=stages,
            microbatches=microbatches,
            chunks=chunks,
            forward=forward,
            backward=backward,
            weight_grad=weight_grad if is_split else None,
        )


def _empty_table(num_ticks: int, stages: int) -> PassTable:
    microbatch, chunk, slot = (np.full((num_ticks, stages), IDLE, np.int32) for _ in range(3))
    return PassTable(microbatch=microbatch, chunk=chunk, slot=slot)


def _add_pass(table: PassTable, tick: int, stage: int, microbatch: int, chunk: int) -> None:
    """Adds one pass of one stage; its slot is assigned later."""
    assert table.microbatch[tick, stage] == IDLE, (tick, stage)
    table.microbatch[tick, stage], table.chunk[tick, stage] = microbatch, chunk


def _assign_slots(passes: Sequence[PassTable]) -> None:
    """Fills in the slots: a forward pass takes the first free slot, the last pass of its chunk frees it."""
    num_ticks, stages = passes[0].slot.shape
    for stage in range(stages):
        free = list(range(num_ticks))  # a heap, with more slots than needed
        slots: dict[tuple[int, int], int] = {}  # by (microbatch, chunk)
        for tick in range(num_ticks):
            for table in passes:
                if not table.active[tick, stage]:
                    continue
                key = int(table.microbatch[tick, stage]), int(table.chunk[tick, stage])
                if table is passes[0]:
                    slots[key] = heapq.heappop(free)
                table.slot[tick, stage] = slots[key]
                if table is passes[-1]:
                    heapq.heappush(free, slots.pop(key))


def format_schedule(schedule: PipelineSchedule, *, width: int = 24) -> list[str]:
    """Formats the table as text: a row per stage, a column per tick, `F`, `B` or `W` and the microbatch.

    The middle of a table of more than `width` ticks is left out.
    """
    ticks = list(range(schedule.num_ticks))
    is_long, half = len(ticks) > width, width // 2
    if is_long:
        ticks = ticks[:half] + ticks[-half:]

    def cell(tick: int, stage: int) -> str:
        passes = []
        for letter, table in zip("FBW", schedule.passes, strict=False):
            if table.active[tick, stage]:
                chunk = chr(ord("a") + int(table.chunk[tick, stage])) if schedule.chunks > 1 else ""
                passes.append(f"{letter}{table.microbatch[tick, stage]}{chunk}")
        return " ".join(passes) or "."

    columns = [[cell(tick, stage) for stage in range(schedule.stages)] for tick in ticks]
    columns = [[text.ljust(max(map(len, column))) for text in column] for column in columns]
    if is_long:
        columns.insert(half, ["..."] * schedule.stages)
    rows = zip(*columns, strict=True)
    return [f"stage {stage:<3}" + "  ".join(row).rstrip() for stage, row in enumerate(rows)]


def schedule_summary(schedule: PipelineSchedule) -> dict[str, tuple[float | str, str]]:
    """Returns statistics of a schedule: name to (value, explanation)."""
    costs = f"{FORWARD_COST:g} forward, {BACKWARD_COST:g} backward with recomputation"
    if schedule.weight_grad is not None:
        costs = f"{FORWARD_COST:g} forward, {INPUT_GRAD_COST:g} input gradients, {WEIGHT_GRAD_COST:g} weight gradients"
    by_stage = ", ".join(map(str, schedule.in_flight))
    return {
        "pipeline bubble": (f"{schedule.bubble:.1%}", f"{schedule.name}: fraction of a step in which a stage idles"),
        "pipeline time": (schedule.total_cost, f"forward passes of a stage and microbatch ({costs})"),
        "microbatches in flight": (schedule.num_slots, f"saved inputs by stage: {by_stage}"),
    }
