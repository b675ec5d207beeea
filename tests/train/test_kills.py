"""A run of two processes that is killed again and again ends as one that is not: bit for bit."""

import random
import subprocess
import time
from collections import Counter

import jax
import numpy as np
import pytest

from jaxinfra.config import load
from jaxinfra.errors import PeerLostError
from jaxinfra.parallel.mesh import make_mesh
from jaxinfra.program import Program
from jaxinfra.run import Run, with_mesh_size
from jaxinfra.track.jsonl import read_metrics
from jaxinfra.trained_params import load_params
from tests.several import all_ended, several
from tests.tiny_run import Tiny, ended

KILLS, STEPS = 20, 600
RUN = ("mesh.fsdp=2", f"train.steps={STEPS}", "train.eval_every=none", "track.console=off", "checkpoint.save_every=20")
TRAINING_S = 0.4
"""Longest time from a start's first step to its kill: twenty of them must not finish the run."""


def logged_bytes(tiny: Tiny, name: str) -> int:
    metrics = tiny.directory(name) / "metrics.jsonl"
    return metrics.stat().st_size if metrics.exists() else 0


def trains(tiny: Tiny, name: str, children: list[subprocess.Popen], timeout_s: float) -> bool:
    """Waits for the first step of a start: its metrics grow, after it has cut off what came after the checkpoint.

    Returns False if there is none within a time.
    """
    deadline_s, least = time.monotonic() + timeout_s, logged_bytes(tiny, name)
    while (size := logged_bytes(tiny, name)) <= least:
        least = size
        if time.monotonic() >= deadline_s:
            return False
        assert all(child.poll() is None for child in children), [child.communicate() for child in children]
        time.sleep(0.01)
    return True


def parameters(tiny: Tiny, name: str) -> list[np.ndarray]:
    run = with_mesh_size(load(tiny.directory(name) / "run.json", ["mesh.fsdp=1"], Run).run, 1)
    program = Program(run, make_mesh(run.mesh, jax.devices()[:1]))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(load_params(tiny.directory(name), program).params)]


@pytest.mark.slow(170)
def test_twenty_kills_change_nothing(tiny: Tiny) -> None:
    with several(str(tiny.config), *RUN, "name=whole", devices=1) as children:
        assert [each.code for each in all_ended(children)] == [0, 0]
    draw, hit, start_s = random.Random(0), Counter[str](), 0.0
    for number in range(KILLS):
        with several(str(tiny.config), *RUN, "name=killed", devices=1) as children:
            if number % 2:  # at some moment of the start: of imports, the join, the restore, the compilation
                is_training = trains(tiny, "killed", children, draw.uniform(0, start_s))
            else:  # while it trains and saves
                started_s = time.monotonic()
                is_training = trains(tiny, "killed", children, 120)
                start_s = time.monotonic() - started_s  # all programs are in the compile cache now
                time.sleep(draw.uniform(0, TRAINING_S))
            index = draw.randrange(2)
            assert children[index].poll() is None, "the run has ended before its last kill"
            children[index].kill()
            hit["training" if is_training else "start"] += 1
            if is_training:
                survivor = ended(children[1 - index])
                assert survivor.code == PeerLostError.exit_code, survivor
            # Before all have joined, nobody but a launcher knows of the loss: the block ends the other process.
    assert hit.total() == KILLS and min(hit["start"], hit["training"]) >= KILLS // 4, hit
    with several(str(tiny.config), *RUN, "name=killed", devices=1) as children:
        ends = all_ended(children)
    assert [each.code for each in ends] == [0, 0], ends
    rows = {name: read_metrics(tiny.directory(name) / "metrics.jsonl") for name in ("whole", "killed")}
    whole, killed = ([(row["step"], row["loss"].hex()) for row in rows[name] if "loss" in row] for name in rows)
    assert len(whole) == STEPS and killed == whole
    for one, other in zip(parameters(tiny, "killed"), parameters(tiny, "whole"), strict=True):
        np.testing.assert_array_equal(one, other)
