"""Pipeline schedules as tables: which microbatch and chunk each stage works on, tick by tick.

A tick has up to three parts, in this order: a forward pass of one chunk, a backward pass of one chunk, and, where
the schedule splits the backward pass, the weight gradients of one chunk. All stages run a part together or none
does: stages of one program wait for their neighbors anyhow, so a part costs its time if any stage needs it. A
chunk is a consecutive run of layers; a stage holds `chunks` of them (virtual stages), and chunk c of stage s stands
at place `c * stages + s` of the model.

Tables are made and checked here, in NumPy, and run by `parallel.pipeline`. What a stage sends is used by its
neighbor in the next tick, always (`check` holds it), so nothing waits between stages but the inputs of chunks, which
their backward passes read again. `slots` of them exist at once on a stage, however many microbatches there are,
except under GPipe.

Sources: GPipe (Huang et al. 2019); 1F1B (Narayanan et al. 2019, PipeDream; 2021, section 2.2), interleaved (same,
section 2.2.2); zero bubble, the split of the backward pass (Qi et al. 2023).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from jaxinfra.config import Problem

type ScheduleName = Literal["gpipe", "1f1b", "interleaved", "zero_bubble"]

IDLE = -1
FORWARD_COST, BACKWARD_COST, WEIGHT_GRAD_COST = 1.0, 3.0, 3.0
"""Costs in forward passes. A backward pass computes the forward pass again, then both gradients."""
INPUT_GRAD_COST = 2.0
"""Cost of a backward pass that leaves out the gradients of weights; they cost another `WEIGHT_GRAD_COST`."""


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """How microbatches pass the stages; their number is `train.accumulate`.

    Attributes:
        schedule: `gpipe`, `1f1b`, `interleaved` (several chunks a stage: a smaller bubble, more transfers), or
            `zero_bubble` (weight gradients apart: pays for very few microbatches alone).
        chunks: chunks a stage, for `interleaved`.
    """

    schedule: ScheduleName = "1f1b"
    chunks: int = 1

    def problems(self) -> Iterable[Problem]:
        """Several chunks are for the interleaved schedule, which needs them."""
        fields = ("schedule", "chunks")
        if self.schedule == "interleaved" and self.chunks < 2:
            yield Problem(fields=fields, message="needs at least 2 chunks a stage", fix="use pipeline.chunks=2")
        if self.schedule != "interleaved" and self.chunks != 1:
            fix = "use pipeline.schedule=interleaved, or pipeline.chunks=1"
            yield Problem(fields=fields, message="has one chunk a stage", fix=fix)

    def make_schedule(self, stages: int, microbatches: int) -> "PipelineSchedule":
        """The table for so many stages and microbatches."""
        return make_schedule(self.schedule, stages=stages, microbatches=microbatches, chunks=self.chunks)


@dataclass(frozen=True, kw_only=True)
class PassTable:
    """One kind of work over all ticks: `[ticks, stages]` arrays, `IDLE` where a stage has none of it.

    Attributes:
        microbatch: whose.
        chunk: which chunk of the stage.
        slot: where the input of the chunk waits.
    """

    microbatch: np.ndarray
    chunk: np.ndarray
    slot: np.ndarray

    @property
    def busy(self) -> np.ndarray:
        """`[ticks, stages]`: who does it when."""
        return self.microbatch != IDLE

    @property
    def runs(self) -> np.ndarray:
        """`[ticks]`: whether any stage does it."""
        return self.busy.any(axis=1)


@dataclass(frozen=True, kw_only=True)
class PipelineSchedule:
    """A table.

    Attributes:
        name: of its kind.
        stages: number of stages.
        microbatches: number of microbatches.
        chunks: chunks a stage.
        forward: forward passes.
        backward: backward passes; without weight gradients where those are apart.
        weights: weight gradients, where they are apart.
    """

    name: ScheduleName
    stages: int
    microbatches: int
    chunks: int
    forward: PassTable
    backward: PassTable
    weights: PassTable | None = None

    @property
    def ticks(self) -> int:
        """Length of the table."""
        return len(self.forward.microbatch)

    @property
    def parts(self) -> tuple[PassTable, ...]:
        """The parts of a tick, in order."""
        return (self.forward, self.backward, *(() if self.weights is None else (self.weights,)))

    @property
    def last(self) -> PassTable:
        """The part that reads the input of a chunk for the last time."""
        return self.backward if self.weights is None else self.weights

    @property
    def num_slots(self) -> int:
        """Inputs of chunks that wait on a stage at once, at most."""
        return int(self.forward.slot.max()) + 1

    @property
    def in_flight(self) -> tuple[int, ...]:
        """By stage, the most inputs that wait on it at once."""
        return tuple(int(column.max()) + 1 for column in self.forward.slot.T)

    def costs(self) -> tuple[float, ...]:
        """What each tick costs, in forward passes of a chunk."""
        backward = BACKWARD_COST if self.weights is None else INPUT_GRAD_COST
        runs = np.stack([part.runs for part in self.parts], axis=1)
        return tuple(
            float(cost) for cost in runs @ np.array([FORWARD_COST, backward, WEIGHT_GRAD_COST])[: len(self.parts)]
        )

    @property
    def total_cost(self) -> float:
        """Cost of the whole table, in forward passes of all layers of a stage."""
        return sum(self.costs()) / self.chunks

    @property
    def bubble(self) -> float:
        """The part of the time in which a stage has nothing to do: of every stage the same."""
        backward = BACKWARD_COST if self.weights is None else INPUT_GRAD_COST
        work = FORWARD_COST + backward + (0.0 if self.weights is None else WEIGHT_GRAD_COST)
        return 1.0 - work * self.microbatches / self.total_cost


def make_schedule(name: ScheduleName, *, stages: int, microbatches: int, chunks: int = 1) -> PipelineSchedule:
    """The table of that name, checked; `chunks` is 1 but for `interleaved`.

    An interleaved table idles where microbatches are no multiple of the stages.
    """
    # The order of chunks and microbatches that a stage goes through: in rounds of as many microbatches as stages.
    rounds = range(0, microbatches, stages)
    order = [(m + i, c) for m in rounds for c in range(chunks) for i in range(stages)]
    # The last stage turns the first microbatch round as soon as its last chunk is through.
    turn = microbatches + stages - 1 if name == "gpipe" else (chunks - 1) * stages + stages - 1
    works = [(k, s, m, c) for k, (m, c) in enumerate(order) for s in range(stages) if m < microbatches]
    entries = {
        "forward": [(k + s, s, m, c) for k, s, m, c in works],
        "backward": [(turn + k + stages - 1 - s, s, m, chunks - 1 - c) for k, s, m, c in works],
    }
    if name == "zero_bubble":
        # Together on all stages, one a tick, once the first stage is through with the first microbatch's inputs.
        begin = turn + stages - 1
        entries["weights"] = [(begin + m, s, m, 0) for m in range(microbatches) for s in range(stages)]
    ticks = 1 + max(entry[0] for part in entries.values() for entry in part)
    parts = {part: _part(found, ticks, stages) for part, found in entries.items()}
    made = _with_slots(PipelineSchedule(name=name, stages=stages, microbatches=microbatches, chunks=chunks, **parts))
    check(made)
    return made


def _part(entries: Iterable[tuple[int, int, int, int]], ticks: int, stages: int) -> PassTable:
    """Entries `(tick, stage, microbatch, chunk)` as arrays, without slots yet."""
    microbatch, chunk, slot = (np.full((ticks, stages), IDLE, np.int32) for _ in range(3))
    for tick, stage, m, c in entries:
        assert microbatch[tick, stage] == IDLE, (tick, stage)
        microbatch[tick, stage], chunk[tick, stage] = m, c
    return PassTable(microbatch=microbatch, chunk=chunk, slot=slot)


def _with_slots(made: PipelineSchedule) -> PipelineSchedule:
    """The table with a slot for every input, free again in the tick after it is read for the last time."""
    slots = [part.slot.copy() for part in made.parts]
    for s in range(made.stages):
        free: list[int] = []
        opened = 0
        held: dict[tuple[int, int], int] = {}
        for tick in range(made.ticks):
            for part, slot in zip(made.parts, slots, strict=True):
                if not part.busy[tick, s]:
                    continue
                key = int(part.microbatch[tick, s]), int(part.chunk[tick, s])
                if part is made.forward:
                    if not free:
                        free, opened = [opened], opened + 1
                    held[key] = free.pop(0)
                slot[tick, s] = held[key]
                if part is made.last:
                    free = sorted((*free, held.pop(key)))
    filled = [replace(part, slot=slot) for part, slot in zip(made.parts, slots, strict=True)]
    return replace(made, **dict(zip(("forward", "backward", "weights"), filled, strict=False)))


def check(made: PipelineSchedule) -> None:
    """Asserts that the table is complete, in order, and that every transfer is used in the next tick."""
    S, V, M = made.stages, made.chunks, made.microbatches
    when = []
    for part in made.parts:
        ticks = np.full((M, V, S), IDLE)
        for tick, stage in np.argwhere(part.busy):
            place = int(part.microbatch[tick, stage]), int(part.chunk[tick, stage]), int(stage)
            assert ticks[place] == IDLE, f"twice: {place}"
            ticks[place] = tick
        assert (ticks != IDLE).all(), "a microbatch is left out"
        when.append(ticks.reshape(M, V * S))
    forward, backward = when[:2]
    assert (np.diff(forward, axis=1) == 1).all(), "activations must be used in the next tick"
    assert (np.diff(backward, axis=1) == -1).all(), "gradients must be used in the next tick"
    assert (backward >= forward).all(), "backward before forward"
    assert made.weights is None or (when[2] >= backward).all(), "weight gradients before the others"


def format_schedule(made: PipelineSchedule, *, width: int = 24) -> list[str]:
    """The table for people: one row a stage, one column a tick; `F`, `B`, `W` with the number of the microbatch.

    Of a table of more than `width` ticks the middle is left out.
    """
    cut, half = made.ticks > width, width // 2
    shown = [*range(half), *range(made.ticks - half, made.ticks)] if cut else list(range(made.ticks))

    def cell(tick: int, stage: int) -> str:
        found = []
        for letter, part in zip("FBW", made.parts, strict=False):
            if part.busy[tick, stage]:
                chunk = chr(ord("a") + int(part.chunk[tick, stage])) if made.chunks > 1 else ""
                found.append(f"{letter}{part.microbatch[tick, stage]}{chunk}")
        return " ".join(found) or "."

    cells = [[cell(tick, stage) for tick in shown] for stage in range(made.stages)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(shown))]
    rows = []
    for stage, row in enumerate(cells):
        padded = [text.ljust(size) for text, size in zip(row, widths, strict=True)]
        if cut:
            padded.insert(half, "...")
        rows.append(f"stage {stage:<3}" + "  ".join(padded).rstrip())
    return rows


def schedule_summary(made: PipelineSchedule) -> dict[str, tuple[float | str, str]]:
    """The numbers of a table by name, each with how it comes about."""
    kept = ", ".join(map(str, made.in_flight))
    each = f"{FORWARD_COST:g} forward, {BACKWARD_COST:g} backward, which computes the forward pass again"
    if made.weights is not None:
        each = f"{FORWARD_COST:g} forward, {INPUT_GRAD_COST:g} backward, {WEIGHT_GRAD_COST:g} gradients of weights"
    return {
        "pipeline bubble": (f"{made.bubble:.1%}", f"{made.name}: of a step, in which a stage has nothing to do"),
        "pipeline time": (made.total_cost, f"forward passes of a stage and microbatch ({each})"),
        "microbatches in flight": (max(made.in_flight), f"inputs kept, by stage: {kept}"),
    }
