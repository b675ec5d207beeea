"""A run in canonical mode goes on bit for bit with other devices and other processes."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxinfra.bench import merge_overrides
from jaxinfra.config import load, validate
from jaxinfra.errors import Preempted
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.run import Run
from jaxinfra.track.jsonl import read_metrics
from jaxinfra.train.trainer import Trainer
from tests.refusals import mended, problem
from tests.several import all_ended, several
from tests.tiny_run import Tiny, ended, start, summary
from tests.train.test_processes import recording


def test_what_cannot_be_honored_is_refused(tiny: Tiny) -> None:
    """Each line suggests overrides that do."""
    for wrong, *named in (
        ("train.canonical=6", "train.canonical=6"),
        ("train.accumulate=2", "train.accumulate=2 train.canonical=8"),
        ("train.global_batch=12", "train.global_batch=12"),
        ("mesh.replica=2", "16 train.canonical=8"),
        ("mesh.replica=3", "24 train.canonical=8"),
        ("optim.optimizer=muon", "optim.optimizer"),
        ("optim.optimizer=adafactor", "optim.optimizer"),
        ("optim.offload=true", "optim.offload"),
    ):
        overrides = merge_overrides(["mesh.fsdp=8", "train.global_batch=48", "train.canonical=8", wrong])
        line = problem(tiny.loaded(*overrides), *named)
        validate(tiny.loaded(*mended(overrides, line)))


@pytest.mark.slow(30)
def test_a_run_goes_on_with_other_devices_and_processes(tiny: Tiny, tmp_path: Path) -> None:
    """Begun on eight devices, then on two, then in two processes of two: losses and state are those of one run."""
    config, run = recording(tiny), ("train.canonical=8", "train.steps=60", "train.eval_every=30")
    env = {"READS": str(tmp_path / "reads")}
    whole = ended(start(str(config), *run, "name=whole", "--devices", "cpu:8", env=env))
    assert whole.code == 0, whole
    done = 0
    for stop, devices in (20, 8), (40, 2):
        where = ("name=parts", "mesh.tensor=2", "--devices", f"cpu:{devices}")
        stopped = ended(start(str(config), *run, *where, env=env | {"STOP_AT": str(stop)}))
        assert stopped.code == Preempted.exit_code, stopped
        before, done = done, summary(tiny.directory("parts"))["steps"]
        assert before < done <= stop
    with several(str(config), *run, "name=parts", "mesh.replica=2", env=env) as children:
        ends = all_ended(children)
    assert [each.code for each in ends] == [0, 0], ends
    sides = []
    for name in ("whole", "parts"):
        rows = [
            row for row in read_metrics(tiny.directory(name) / "metrics.jsonl") if {"loss", "eval/loss"} & row.keys()
        ]
        state = Trainer(replace(load(config, [*run, f"name={name}"], root=Run).run, mesh=MeshConfig(fsdp=8))).state
        leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]
        sides.append(([(row["step"], row.get("loss"), row.get("eval/loss")) for row in rows], leaves))
    assert len(sides[0][0]) == 62 and sides[0] == sides[1]
