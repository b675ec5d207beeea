"""Pipeline schedules as tables: the microbatch and chunk that each stage works on in each tick.

A tick has up to three passes, in this order: a forward pass of one chunk, a backward pass of one chunk and, in
`zero_bubble`, the weight gradients of one chunk. The stages run as one program, so a pass costs its time on all stages
if any stage runs it. A chunk is a run of consecutive layers (Megatron's model chunk, or virtual stage). A stage holds
`chunks` of them: chunk c of stage s is number `c * stages + s` in the order of the model.

`make_schedule` builds and checks a table in NumPy; `parallel.pipeline` runs it. A stage uses what its neighbor sends in
the next tick, so only the inputs of chunks are saved, for the backward pass that recomputes the chunk. A stage saves at
most `num_slots` of them; except in GPipe that does not depend on the number of microbatches.

Sources: GPipe (Huang et al. 2019); 1F1B (Narayanan et al. 2019, PipeDream; 2021, section 2.2), interleaved (same,
section 2.2.2); zero bubble, which splits the backward pass (Qi et al. 2023).
"""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from jaxinfra.config import Problem

type ScheduleName = Literal["gpipe", "1f1b", "interleaved", "zero_bubble"]

IDLE = -1

# Costs, in forward passes. A backward pass recomputes the forward pass, then computes gradients of inputs and weights.
FORWARD_COST, BACKWARD_COST = 1.0, 3.0
# A split backward pass recomputes the forward pass twice, once for each half.
INPUT_GRAD_COST, WEIGHT_GRAD_COST = 2.0, 3.0


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

    def make_schedule(self, stages: int, microbatches: int) -> "PipelineSchedule":
        """Builds the schedule for this number of stages and microbatches."""
        return make_schedule(self.schedule, stages=stages, microbatches=microbatches, chunks=self.chunks)


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


def make_schedule(name: ScheduleName, *, stages: int, microbatches: int, chunks: int = 1) -> PipelineSchedule:
    """Builds and checks a table; `chunks` is 1 except for `interleaved`.

    An interleaved schedule has idle ticks if the microbatches are not a multiple of the stages.
    """
    # Every stage takes `stages` microbatches through its first chunk, then through its second, and so on.
    order = [
        (first + i, chunk) for first in range(0, microbatches, stages) for chunk in range(chunks) for i in range(stages)
    ]
    work = [(k, s, m, c) for k, (m, c) in enumerate(order) for s in range(stages) if m < microbatches]
    # On the last stage GPipe's backward passes follow all forward passes; others begin with the first output.
    first_backward = stages - 1 + (microbatches if name == "gpipe" else (chunks - 1) * stages)
    # Entries are (tick, stage, microbatch, chunk).
    entries = {
        "forward": [(k + s, s, m, c) for k, s, m, c in work],
        "backward": [(first_backward + k + stages - 1 - s, s, m, chunks - 1 - c) for k, s, m, c in work],
    }
    if name == "zero_bubble":
        # All stages at once, one microbatch a tick, from the tick in which its gradient reaches the first stage.
        start = first_backward + stages - 1
        entries["weight_grad"] = [(start + m, s, m, 0) for m in range(microbatches) for s in range(stages)]
    num_ticks = 1 + max(tick for rows in entries.values() for tick, *_ in rows)
    tables = {key: _pass_table(rows, num_ticks, stages) for key, rows in entries.items()}
    _assign_slots(list(tables.values()))
    schedule = PipelineSchedule(name=name, stages=stages, microbatches=microbatches, chunks=chunks, **tables)
    check_schedule(schedule)
    return schedule


def _pass_table(entries: Iterable[tuple[int, int, int, int]], num_ticks: int, stages: int) -> PassTable:
    """Writes entries `(tick, stage, microbatch, chunk)` into arrays; slots are still `IDLE`."""
    microbatch, chunk, slot = (np.full((num_ticks, stages), IDLE, np.int32) for _ in range(3))
    for tick, s, m, c in entries:
        assert microbatch[tick, s] == IDLE, (tick, s)
        microbatch[tick, s], chunk[tick, s] = m, c
    return PassTable(microbatch=microbatch, chunk=chunk, slot=slot)


def _assign_slots(passes: list[PassTable]) -> None:
    """Fills in the slots: the forward pass takes one, the last pass frees it for the next tick."""
    num_ticks, stages = passes[0].slot.shape
    for s in range(stages):
        num_slots, free = 0, []
        slots: dict[tuple[int, int], int] = {}
        for tick in range(num_ticks):
            for table in passes:
                if not table.active[tick, s]:
                    continue
                key = int(table.microbatch[tick, s]), int(table.chunk[tick, s])
                if table is passes[0]:
                    if not free:
                        free, num_slots = [num_slots], num_slots + 1
                    slots[key] = heapq.heappop(free)
                table.slot[tick, s] = slots[key]
                if table is passes[-1]:
                    heapq.heappush(free, slots.pop(key))


def check_schedule(schedule: PipelineSchedule) -> None:
    """Asserts that every pass runs once, in order, and that transfers are used in the next tick."""
    S, V, M = schedule.stages, schedule.chunks, schedule.microbatches
    ticks_of_passes = []
    for table in schedule.passes:
        ticks = np.full((M, V, S), IDLE)
        for tick, s in np.argwhere(table.active):
            key = int(table.microbatch[tick, s]), int(table.chunk[tick, s]), int(s)
            assert ticks[key] == IDLE, f"(microbatch, chunk, stage) {key} runs twice"
            ticks[key] = tick
        assert (ticks != IDLE).all(), "a microbatch is missing"
        ticks_of_passes.append(ticks.reshape(M, V * S))
    forward, backward, *weight_grad = ticks_of_passes
    assert (np.diff(forward, axis=1) == 1).all(), "activations must be used in the next tick"
    assert (np.diff(backward, axis=1) == -1).all(), "gradients must be used in the next tick"
    assert (backward >= forward).all(), "backward before forward"
    assert all((ticks >= backward).all() for ticks in weight_grad), "weight gradients before input gradients"


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
