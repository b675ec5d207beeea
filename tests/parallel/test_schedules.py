"""Schedules are complete and in order, cost what their formulas say, and keep no more than they need."""

import itertools
from typing import Any

import numpy as np
import pytest

from jaxinfra.parallel.schedules import IDLE, PipelineSchedule, format_schedule, make_schedule

KINDS = [("gpipe", 1), ("1f1b", 1), ("zero_bubble", 1), ("interleaved", 2), ("interleaved", 3)]
SIZES = [(1, 1), (1, 3), (2, 1), (2, 2), (2, 8), (3, 6), (4, 4), (4, 12), (8, 16)]


def tables() -> list[PipelineSchedule]:
    """Every kind with stages and microbatches that it takes in full rounds."""
    made = []
    for (name, chunks), (stages, microbatches) in itertools.product(KINDS, SIZES):
        if chunks == 1 or microbatches % stages == 0:
            made.append(make_schedule(name, stages=stages, microbatches=microbatches, chunks=chunks))
    return made


def name(made: PipelineSchedule) -> str:
    return f"{made.name}-{made.chunks}x{made.stages}-by{made.microbatches}"


def run(made: PipelineSchedule) -> dict[str, list[Any]]:
    """What a machine that obeys the table does, with names in place of arrays.

    An activation is `(microbatch, place)`: what has passed the places before. A gradient likewise: of the input of
    the place. Whatever meets something that it should not meet fails here.
    """
    last = made.stages * made.chunks - 1
    up: list[Any] = [None] * made.stages
    down: list[Any] = [None] * made.stages
    waiting: dict[tuple[int, int], Any] = {}
    done: dict[str, list[Any]] = {"losses": [], "weights": []}
    for tick in range(made.ticks):
        sent: list[Any] = [None] * made.stages
        for s in range(made.stages):
            m, c, slot = (int(table[tick, s]) for table in _tables(made.forward))
            if m == IDLE:
                continue
            place = c * made.stages + s
            x = (m, 0) if place == 0 else up[s]
            assert x == (m, place)
            waiting[s, slot] = x
            sent[(s + 1) % made.stages] = (m, place + 1)
        up = sent
        sent = [None] * made.stages
        for s in range(made.stages):
            m, c, slot = (int(table[tick, s]) for table in _tables(made.backward))
            if m == IDLE:
                continue
            place = c * made.stages + s
            assert waiting[s, slot] == (m, place), "the input was overwritten"
            if place == last:
                done["losses"].append(m)
            else:
                assert down[s] == (m, place + 1)
            sent[(s - 1) % made.stages] = (m, place)
            if made.weights is None:
                done["weights"].append((m, place))
        down = sent
        if made.weights is not None:
            for s in range(made.stages):
                m, c, slot = (int(table[tick, s]) for table in _tables(made.weights))
                if m != IDLE:
                    assert waiting[s, slot] == (m, c * made.stages + s)
                    done["weights"].append((m, c * made.stages + s))
    return done


def _tables(part: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return part.microbatch, part.chunk, part.slot


@pytest.mark.parametrize("made", tables(), ids=name)
def test_a_machine_that_obeys_the_table_trains_every_microbatch_once(made: PipelineSchedule) -> None:
    done = run(made)
    places = range(made.stages * made.chunks)
    assert sorted(done["losses"]) == list(range(made.microbatches))
    assert sorted(done["weights"]) == sorted(itertools.product(range(made.microbatches), places))


@pytest.mark.parametrize("made", tables(), ids=name)
def test_the_bubble_is_that_of_the_formula(made: PipelineSchedule) -> None:
    """(S - 1) / (V M + S - 1); with weight gradients apart, 3 (S - 1) of 6 M + 3 (S - 1)."""
    S, V, M = made.stages, made.chunks, made.microbatches
    wanted = (S - 1) / (V * M + S - 1) if made.name != "zero_bubble" else 3 * (S - 1) / (6 * M + 3 * (S - 1))
    assert made.bubble == pytest.approx(wanted)


def test_weight_gradients_apart_pay_for_few_microbatches_alone() -> None:
    """They cost another forward pass each: less time than 1F1B needs 2 M < S - 1."""
    for stages, microbatches in itertools.product((2, 4, 8, 16), (1, 2, 4, 8)):
        apart, together = (make_schedule(n, stages=stages, microbatches=microbatches) for n in ("zero_bubble", "1f1b"))
        assert (apart.total_cost < together.total_cost) == (2 * microbatches < stages - 1)


@pytest.mark.parametrize("stages", [2, 4, 8])
def test_1f1b_keeps_as_many_inputs_however_many_microbatches_there_are(stages: int) -> None:
    """Stage s keeps 2 (S - 1 - s) + 1: a microbatch goes to the end and back. GPipe keeps them all."""
    for microbatches in (2 * stages, 32, 128):
        made = make_schedule("1f1b", stages=stages, microbatches=microbatches)
        assert made.in_flight == tuple(2 * (stages - 1 - s) + 1 for s in range(stages))
        assert made.num_slots == 2 * stages - 1
        assert make_schedule("gpipe", stages=stages, microbatches=microbatches).num_slots == microbatches


@pytest.mark.parametrize("chunks", [2, 4])
def test_interleaved_keeps_as_many_inputs_however_many_microbatches_there_are(chunks: int) -> None:
    """(V + 1) S - 1, a chunk's input each."""
    for microbatches in (16, 32, 128):
        made = make_schedule("interleaved", stages=4, microbatches=microbatches, chunks=chunks)
        assert made.num_slots == (chunks + 1) * 4 - 1


def test_weight_gradients_apart_keep_no_more_inputs() -> None:
    assert {make_schedule("zero_bubble", stages=4, microbatches=m).num_slots for m in (8, 32, 128)} == {7}


def test_the_picture() -> None:
    assert format_schedule(make_schedule("1f1b", stages=3, microbatches=3)) == [
        "stage 0  F0  F1  F2     .      B0     B1  B2",
        "stage 1  .   F0  F1     F2 B0  B1     B2  .",
        "stage 2  .   .   F0 B0  F1 B1  F2 B2  .   .",
    ]


def test_the_picture_of_a_long_table_leaves_its_middle_out() -> None:
    rows = format_schedule(make_schedule("1f1b", stages=2, microbatches=64), width=6)
    assert all(row.count("...") == 1 for row in rows)
    assert rows[0].startswith("stage 0  F0") and rows[0].endswith("B63")


def test_chunks_are_letters_in_the_picture() -> None:
    first = format_schedule(make_schedule("interleaved", stages=2, microbatches=2, chunks=2))[0]
    assert first.split()[2:6] == ["F0a", "F1a", "F0b", "F1b"]
