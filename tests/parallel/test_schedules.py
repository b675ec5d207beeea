"""Schedules run every pass once and in order, cost what their formulas say, and save no more inputs than needed."""

import itertools

import pytest

from jaxinfra.parallel.schedules import IDLE, PassTable, PipelineConfig, PipelineSchedule, format_schedule

KINDS = [("gpipe", 1), ("1f1b", 1), ("zero_bubble", 1), ("interleaved", 2), ("interleaved", 3)]
SIZES = [(1, 1), (1, 3), (2, 1), (2, 2), (2, 8), (3, 6), (4, 4), (4, 12), (8, 16)]

SCHEDULES = [
    PipelineConfig(schedule=name, chunks=chunks).make_schedule(stages, microbatches)
    for (name, chunks), (stages, microbatches) in itertools.product(KINDS, SIZES)
    if chunks == 1 or microbatches % stages == 0
]


def schedule_id(schedule: PipelineSchedule) -> str:
    return f"{schedule.name}-{schedule.chunks}x{schedule.stages}-by{schedule.microbatches}"


def entry(table: PassTable, tick: int, stage: int) -> tuple[int, int, int]:
    return int(table.microbatch[tick, stage]), int(table.chunk[tick, stage]), int(table.slot[tick, stage])


def simulate(schedule: PipelineSchedule) -> tuple[list[int], list[tuple[int, int]]]:
    """Runs the table on names instead of arrays; returns the losses and weight gradients that were computed.

    `(microbatch, place)` stands for the input of chunk `place` of the model, and for its gradient.
    """
    S = schedule.stages
    activations: list[tuple[int, int] | None] = [None] * S
    grads: list[tuple[int, int] | None] = [None] * S
    saved: dict[tuple[int, int], tuple[int, int]] = {}
    saved_grads: dict[tuple[int, int], tuple[int, int]] = {}
    losses, weight_grads = [], []
    for tick in range(schedule.num_ticks):
        sent: list[tuple[int, int] | None] = [None] * S
        for s in range(S):
            m, c, slot = entry(schedule.forward, tick, s)
            if m == IDLE:
                continue
            place = c * S + s
            assert (m, place) == ((m, 0) if place == 0 else activations[s])
            saved[s, slot] = (m, place)
            sent[(s + 1) % S] = (m, place + 1)
        activations, sent = sent, [None] * S
        for s in range(S):
            m, c, slot = entry(schedule.backward, tick, s)
            if m == IDLE:
                continue
            place = c * S + s
            assert saved[s, slot] == (m, place), "the input was overwritten"
            if place == S * schedule.chunks - 1:
                losses.append(m)
            else:
                assert grads[s] == (m, place + 1)
            sent[(s - 1) % S] = (m, place)
            saved_grads[s, slot] = (m, place)
            if schedule.weight_grad is None:
                weight_grads.append((m, place))
        grads = sent
        if schedule.weight_grad is not None:
            for s in range(S):
                m, c, slot = entry(schedule.weight_grad, tick, s)
                if m != IDLE:
                    assert saved[s, slot] == saved_grads[s, slot] == (m, c * S + s)
                    weight_grads.append((m, c * S + s))
    return losses, weight_grads


@pytest.mark.parametrize("schedule", SCHEDULES, ids=schedule_id)
def test_every_microbatch_is_trained_once(schedule: PipelineSchedule) -> None:
    losses, weight_grads = simulate(schedule)
    places = range(schedule.stages * schedule.chunks)
    assert sorted(losses) == list(range(schedule.microbatches))
    assert sorted(weight_grads) == sorted(itertools.product(range(schedule.microbatches), places))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=schedule_id)
def test_the_bubble_is_that_of_the_formula(schedule: PipelineSchedule) -> None:
    """(S - 1) / (V M + S - 1); for zero_bubble 3 (S - 1) / (6 M + 3 (S - 1))."""
    S, V, M = schedule.stages, schedule.chunks, schedule.microbatches
    wanted = (S - 1) / (V * M + S - 1) if schedule.name != "zero_bubble" else 3 * (S - 1) / (6 * M + 3 * (S - 1))
    assert schedule.bubble == pytest.approx(wanted)


def test_zero_bubble_is_faster_only_with_few_microbatches() -> None:
    """Separate weight gradients cost another forward pass each: faster than 1F1B if 2 M < S - 1."""
    for stages, microbatches in itertools.product((2, 4, 8, 16), (1, 2, 4, 8)):
        split, whole = (PipelineConfig(schedule=n).make_schedule(stages, microbatches) for n in ("zero_bubble", "1f1b"))
        assert (split.total_cost < whole.total_cost) == (2 * microbatches < stages - 1)


@pytest.mark.parametrize("stages", [2, 4, 8])
def test_1f1b_saves_a_bounded_number_of_inputs(stages: int) -> None:
    """Stage s saves 2 (S - 1 - s) + 1: a microbatch goes to the end and back. GPipe saves them all."""
    for microbatches in (2 * stages, 32, 128):
        schedule = PipelineConfig(schedule="1f1b").make_schedule(stages, microbatches)
        assert schedule.in_flight == tuple(2 * (stages - 1 - s) + 1 for s in range(stages))
        assert schedule.num_slots == 2 * stages - 1
        assert PipelineConfig(schedule="gpipe").make_schedule(stages, microbatches).num_slots == microbatches


@pytest.mark.parametrize("chunks", [2, 4])
def test_interleaved_saves_a_bounded_number_of_inputs(chunks: int) -> None:
    """(V + 1) S - 1 inputs of chunks."""
    for microbatches in (16, 32, 128):
        schedule = PipelineConfig(schedule="interleaved", chunks=chunks).make_schedule(4, microbatches)
        assert schedule.num_slots == (chunks + 1) * 4 - 1


def test_zero_bubble_saves_a_bounded_number_of_inputs() -> None:
    assert {PipelineConfig(schedule="zero_bubble").make_schedule(4, m).num_slots for m in (8, 32, 128)} == {7}


def test_format_schedule() -> None:
    assert format_schedule(PipelineConfig(schedule="1f1b").make_schedule(3, 3)) == [
        "stage 0  F0  F1  F2     .      B0     B1  B2",
        "stage 1  .   F0  F1     F2 B0  B1     B2  .",
        "stage 2  .   .   F0 B0  F1 B1  F2 B2  .   .",
    ]


def test_format_schedule_leaves_out_the_middle_of_a_long_table() -> None:
    rows = format_schedule(PipelineConfig(schedule="1f1b").make_schedule(2, 64), width=6)
    assert all(row.count("...") == 1 for row in rows)
    assert rows[0].startswith("stage 0  F0") and rows[0].endswith("B63")


def test_format_schedule_names_chunks_by_letters() -> None:
    first = format_schedule(PipelineConfig(schedule="interleaved", chunks=2).make_schedule(2, 2))[0]
    assert first.split()[2:6] == ["F0a", "F1a", "F0b", "F1b"]
