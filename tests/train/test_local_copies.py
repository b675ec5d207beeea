"""Copies on the hosts: what a kill, a lost host or damage leaves of them, and that the bits of a run stay the same."""

import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxinfra.config import load
from jaxinfra.errors import PeerLostError, StorageError
from jaxinfra.inference.trained_params import load_params
from jaxinfra.parallel.mesh import make_mesh
from jaxinfra.processes.peers import Peers
from jaxinfra.program import Program
from jaxinfra.run import Run, with_mesh_size
from jaxinfra.track.jsonl import read_metrics
from jaxinfra.train.reporting import Reporting
from jaxinfra.train.trainer import Trainer
from tests.refusals import names, refused
from tests.several import several
from tests.tiny_run import Ended, Tiny, ended


def parameters(tiny: Tiny, name: str) -> list[np.ndarray]:
    run = with_mesh_size(load(tiny.directory(name) / "run.json", ["mesh.fsdp=1"], Run).run, 1)
    program = Program(run, make_mesh(run.mesh, jax.devices()[:1]))
    loaded = load_params(tiny.directory(name), program, Peers())
    return [np.asarray(leaf) for leaf in jax.tree.leaves(loaded.params)]


_usage = shutil.disk_usage
RUN = ("train.eval_every=none", "checkpoint.save_every=40", "train.steps=90", "mesh.fsdp=2")


def local(tiny: Tiny) -> Path:
    return tiny.runs.parent / "local"


def shards(folder: Path) -> list[Path]:
    """The files of the newest copy that has a manifest."""
    manifest = max(folder.glob("*/manifest.json"), key=lambda path: int(path.parent.name.partition(".")[0]))
    return sorted(path for path in manifest.parent.iterdir() if path != manifest)


def flip(files: Sequence[Path]) -> None:
    """Flips a bit in the middle of each file."""
    for file in files:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


def last_step(tiny: Tiny) -> int:
    metrics = tiny.directory("killed") / "metrics.jsonl"
    rows = read_metrics(metrics) if metrics.exists() else []
    return int(rows[-1]["step"]) if rows else 0


def killed(tiny: Tiny, *words: str, after: int) -> Ended:
    """Starts two processes and kills the second after a step; returns how the first has ended."""
    with several(str(tiny.config), *words, devices=1) as children:
        deadline_s = time.monotonic() + 300
        while last_step(tiny) <= after:
            assert time.monotonic() < deadline_s and all(child.poll() is None for child in children)
            time.sleep(0.005)
        children[1].kill()
        first = ended(children[0])
        assert first.code == PeerLostError.exit_code, first
        return first


@pytest.mark.slow(50)
def test_a_kill_and_a_lost_host_change_nothing(tiny: Tiny) -> None:
    """The last start is one process, whose devices are those of the two: a copy does not ask who has written it."""
    assert ended(tiny.start(*RUN, "name=whole", devices=2)).code == 0
    words = (*RUN, "name=killed", f"checkpoint.local={local(tiny)}", "checkpoint.local_every=3")
    killed(tiny, *words, after=47)
    first, second = sorted(local(tiny).iterdir())
    assert len(shards(first)) == len(shards(second)) > 0  # each keeps the shards of both
    shutil.rmtree(second)  # with its host
    resumed = killed(tiny, *words, after=62)
    assert "at step 4" in resumed.out and "copies on the hosts; the newest checkpoint is 40" in resumed.out, resumed
    assert "process 1" in names(resumed.err.splitlines()[0], f"{local(tiny)}: step 4")
    end = ended(tiny.start(*words, devices=2))
    assert end.code == 0 and "copies on the hosts; the newest checkpoint is 40" in end.out, end
    assert tiny.losses("killed") == tiny.losses("whole")
    for one, other in zip(parameters(tiny, "killed"), parameters(tiny, "whole"), strict=True):
        np.testing.assert_array_equal(one, other)
    assert [*local(tiny).glob("*-0")] == []  # the run has ended with a checkpoint


def test_damage_and_a_full_disk_cost_only_the_copy(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    words = ("mesh.fsdp=8", "train.eval_every=none")
    copies = (f"checkpoint.local={local(tiny)}", "checkpoint.local_every=2")

    def crash(step: int) -> None:
        dispatched = Reporting.dispatched

        def crashing(self: Reporting, number: int, *arguments: Any, **keywords: Any) -> None:
            if number == step:
                raise RuntimeError("crash")
            dispatched(self, number, *arguments, **keywords)

        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="crash"):
            patch.setattr(Reporting, "dispatched", crashing)
            Trainer(tiny.loaded(*words, *copies, "name=killed")).train()

    def usage(path: str | Path) -> Any:
        return _usage(path)._replace(free=1000 if "local" in str(path) else 2**40)

    assert tiny.launch(*words, "name=whole").code == 0
    local(tiny).mkdir()
    monkeypatch.setattr(shutil, "disk_usage", usage)
    line = refused(tiny.launch(*words, *copies, "name=killed"), f"{local(tiny)}: copies", code=StorageError.exit_code)
    assert "checkpoint.local=none" in line
    monkeypatch.setattr(shutil, "disk_usage", _usage)
    crash(10)  # after the copy of step 8
    (folder,) = local(tiny).iterdir()
    assert [path.name.partition(".")[0] for path in folder.iterdir()] == ["8"]
    flip(shards(folder)[:1])
    monkeypatch.setattr(shutil, "disk_usage", usage)  # a run that resumes goes on
    with caplog.at_level(logging.WARNING):
        end = tiny.launch(*words, *copies, "name=killed")
    assert end.code == 0 and "resuming" in end.out and "at step 5 of 12\n" in end.out, end
    assert any("1.0 kB free" in text and "training goes on" in text for text in caplog.messages)
    names(next(text for text in caplog.messages if "step 8" in text), f"{local(tiny)}: not used: is damaged")
    assert tiny.losses("killed") == tiny.losses("whole")
