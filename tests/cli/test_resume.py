"""Stopping and going on: the numbers of an interrupted run are those of one that never stopped, bit for bit."""

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxinfra.checkpoint.manager import CheckpointManager
from jaxinfra.parallel.mesh import make_mesh
from jaxinfra.program import Program
from jaxinfra.run import with_mesh_size
from jaxinfra.track.jsonl import JsonlTracker, read_metrics
from jaxinfra.train.reporting import Reporting
from jaxinfra.train.trainer import Trainer
from tests.refusals import names, preempted, refused
from tests.tiny_run import STEPS, Tiny, contents, ended, launch, summary

RECIPES = {
    "plain": [],
    "all that has state": [
        "optim.optimizer=muon",
        "optim.ema_decay=0.9",
        "train.accumulate=2",
        "train.global_batch=16",
        "mesh.fsdp=4",
        "mesh.tensor=2",
        "precision.compute=bfloat16",
    ],
    "state in host memory": ["optim.offload=true", "optim.ema_decay=0.9", "mesh.fsdp=4", "mesh.tensor=2"],
}


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch):
    """Makes SIGTERM come while a step is being logged."""

    def at(last: int) -> None:
        def log(self: JsonlTracker, step: int, metrics: Mapping[str, float]) -> None:
            plain(self, step, metrics)
            if step == last:
                signal.raise_signal(signal.SIGTERM)

        monkeypatch.setattr(JsonlTracker, "log", log)

    plain = JsonlTracker.log
    yield at
    monkeypatch.undo()


def saved(tiny: Tiny, directory: Path, step: int, *overrides: str) -> list[np.ndarray]:
    """All arrays of a checkpoint, restored onto the mesh of these overrides."""
    run = with_mesh_size(tiny.loaded(*overrides), len(jax.devices()))
    program = Program(run, make_mesh(run.mesh, jax.devices()))
    with program.on_mesh, CheckpointManager(directory / "checkpoints", read_only=True) as checkpoints:
        return [np.asarray(leaf) for leaf in jax.tree.leaves(checkpoints.restore(step, program.state))]


def assert_same_bits(left: list[np.ndarray], right: list[np.ndarray]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_stop_and_go_on(tiny: Tiny, recipe: list[str], stop_after, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tiny.launch(*recipe, "name=whole").code == 0
    stop_after(7)
    stopped = tiny.launch(*recipe, "name=parts")
    monkeypatch.undo()
    # The signal comes while step 7 is reported and step 8 runs.
    preempted(stopped, f"{tiny.directory('parts')}: SIGTERM 8 {STEPS}")
    assert summary(tiny.directory("parts"))["status"] == "stopped"
    assert set(tiny.losses("parts")) == set(range(1, 9))
    assert tiny.launch(*recipe, "name=parts").code == 0
    assert summary(tiny.directory("parts"))["status"] == "finished"
    assert tiny.losses("parts") == tiny.losses("whole")
    parts, whole = (saved(tiny, tiny.directory(name), STEPS, *recipe) for name in ("parts", "whole"))
    assert_same_bits(parts, whole)


@pytest.mark.jax_range
def test_go_on_after_a_kill(begun: Tiny, stopped: Path) -> None:
    """What was done after the last checkpoint is done again; the log has every step once."""
    whole = begun.losses()
    assert begun.launch().code == 0
    assert begun.losses() == whole and len(whole) == STEPS
    rows = read_metrics(begun.directory() / "metrics.jsonl")
    assert [row["step"] for row in rows if "eval/loss" in row] == [5, 10, STEPS]
    assert_same_bits(saved(begun, begun.directory(), STEPS), saved(begun, stopped.parent / "whole", STEPS))


def test_a_kill_changes_no_mean_and_logs_no_step_twice(
    tiny: Tiny, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second start goes on from a checkpoint, the third from a copy; both are between two logged steps."""
    words = ("track.log_every=3", "track.console=off", "train.eval_every=none")
    copies = (f"checkpoint.local={tiny.runs.parent}/local", "checkpoint.local_every=2")
    dispatched = Reporting.dispatched

    def crash(last: int, *copies: str) -> None:
        def crashing(self: Reporting, step: int, *arguments: Any, **keywords: Any) -> None:
            if step > last:
                raise RuntimeError("crash")
            dispatched(self, step, *arguments, **keywords)

        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="crash"):
            patch.setattr(Reporting, "dispatched", crashing)
            Trainer(tiny.loaded(*words, *copies)).train()

    crash(5)
    assert [step.name for step in (tiny.directory() / "checkpoints").iterdir()] == ["5"]
    crash(8, *copies)
    assert [copy.name.partition(".")[0] for copy in tiny.runs.parent.glob("local/*/*")] == ["8"]
    Trainer(tiny.loaded(*words, *copies)).train()
    rows = [row for row in read_metrics(tiny.directory() / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 3, 6, 9, STEPS]
    losses = [row["loss"] for row in read_metrics(stopped.parent / "whole" / "metrics.jsonl") if "loss" in row]
    assert [row["loss"] for row in rows] == [losses[int(row["step"]) - 1] for row in rows]
    windows = [losses[:1], losses[1:3], losses[3:6], losses[6:9], losses[9:]]
    assert [row["loss_mean"] for row in rows] == [[*accumulate(window)][-1] / len(window) for window in windows]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def flip_newest(directory: Path, part: str = "params") -> Path:
    """Flips a bit of the largest file of a part of the newest checkpoint; returns the checkpoint."""
    checkpoints = directory / "checkpoints"
    newest = max((path for path in checkpoints.iterdir() if path.name.isdecimal()), key=lambda path: int(path.name))
    files = [path for path in newest.glob(f"{part}/**/*") if path.is_file()]
    flip(max(files, key=lambda path: path.stat().st_size))
    return newest


@pytest.fixture
def killed(tiny: Tiny) -> Tiny:
    """A run that was killed after step 12, and has saved steps 5 and 10."""
    assert tiny.launch("checkpoint.keep_last=9", "track.console=off").code == 0
    shutil.rmtree(tiny.directory() / "checkpoints" / str(STEPS))
    return tiny


def test_go_on_from_before_a_damaged_checkpoint(killed: Tiny, stopped: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The steps since the last intact one are done again, and nothing else is different."""
    directory, whole = killed.directory(), killed.losses()
    damaged = flip_newest(directory, "opt_state")
    ended = killed.launch()
    assert ended.code == 0 and "at step 5 of 12" in ended.out, ended
    (warning,) = caplog.messages
    names(warning, f"{damaged}: damaged: opt_state/ {damaged}.damaged step 5")
    assert Path(f"{damaged}.damaged").is_dir() and killed.losses() == whole
    assert_same_bits(saved(killed, directory, STEPS), saved(killed, stopped.parent / "whole", STEPS))
    # A command that only reads says the same, and changes nothing.
    caplog.clear()
    newest = flip_newest(directory)
    shown = launch("evaluate", str(directory))
    assert shown.code == 0 and "step 10" in shown.out and newest.is_dir(), shown
    names(caplog.messages[-1], f"{newest}: damaged: params/ step 10")
    refused(launch("evaluate", f"{directory}@{STEPS}"), f"{newest}: params/", code=79)


def test_a_kill_after_the_last_checkpoint_leaves_nothing_out(tiny: Tiny) -> None:
    """Before the summary was written: the next start writes it, and the report."""
    assert tiny.launch("track.console=off").code == 0
    directory = tiny.directory()
    whole = summary(directory)
    (directory / "summary.json").unlink()
    (directory / "report.html").write_text("of a run that was not finished")
    ended = tiny.launch("track.console=off")
    assert ended.code == 0 and "nothing to do" in ended.out
    again = summary(directory)
    assert again.pop("wall_s") <= whole.pop("wall_s"), "up to the last logged step"
    assert again == whole
    assert ">finished<" in (directory / "report.html").read_text()


def test_a_folder_without_a_manifest_is_no_progress(begun: Tiny) -> None:
    (begun.directory() / "checkpoints" / str(STEPS + 10)).mkdir()
    ended = begun.launch()
    assert ended.code == 0 and "at step 10 of 12" in ended.out, ended


def test_no_intact_checkpoint_is_no_new_start(killed: Tiny) -> None:
    losses = killed.losses()
    for path in (killed.directory() / "checkpoints").glob("*/manifest.json"):
        flip(path)
    for _ in range(2):
        reasons = f"{killed.directory()}/checkpoints: step 10: manifest.json step 5: manifest.json"
        refused(killed.launch(), reasons, code=79)
    assert killed.losses() == losses


@pytest.mark.jax_range
@pytest.mark.parametrize("memory", [(), ("optim.offload=true",)], ids=["on the devices", "on the host"])
def test_go_on_with_another_mesh(begun: Tiny, memory: tuple[str, ...]) -> None:
    """And with its state in another memory: the restored arrays are the same, losses from there on to rounding."""
    other = ("mesh.fsdp=4", "mesh.tensor=2", *memory)
    assert_same_bits(saved(begun, begun.directory(), 10), saved(begun, begun.directory(), 10, *other))
    whole = list(map(float.fromhex, begun.losses().values()))
    assert begun.launch(*other).code == 0
    moved = list(map(float.fromhex, begun.losses().values()))
    assert moved[:10] == whole[:10]
    assert moved[10:] == pytest.approx(whole[10:], rel=1e-5)
    record = json.loads((begun.directory() / "run.json").read_text())
    assert record["devices"]["mesh"] == {"replica": 1, "stage": 1, "fsdp": 4, "expert": 1, "context": 1, "tensor": 2}


STAGES = {
    "uneven": ("mesh.stage=2", "mesh.fsdp=4"),
    "two chunks a stage": (
        "mesh.stage=2",
        "mesh.fsdp=2",
        "mesh.tensor=2",
        "pipeline.schedule=interleaved",
        "pipeline.chunks=2",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("stages", STAGES.values(), ids=STAGES)
def test_checkpoints_know_nothing_of_stages(tiny: Tiny, stages: tuple[str, ...]) -> None:
    """Trained and evaluated in stages, gone on with without them: the losses are those of a run without."""
    model = ("model.num_layers=5", "train.accumulate=2", "train.global_batch=16")
    whole, parts = (*model, "name=whole"), (*model, "name=parts")
    assert tiny.launch(*whole).code == 0
    staged = tiny.launch(*parts, *stages)
    assert staged.code == 0, staged.err
    shutil.rmtree(tiny.directory("parts") / "checkpoints" / str(STEPS))
    directory = tiny.directory("parts")
    assert_same_bits(saved(tiny, directory, 10, *parts), saved(tiny, directory, 10, *parts, *stages))
    assert tiny.launch(*parts).code == 0
    found, wanted = (list(map(float.fromhex, tiny.losses(name).values())) for name in ("parts", "whole"))
    assert found == pytest.approx(wanted, rel=2e-5)
    validation = [
        [row["eval/loss"] for row in read_metrics(tiny.directory(name) / "metrics.jsonl") if "eval/loss" in row]
        for name in ("parts", "whole")
    ]
    assert len(validation[0]) == 3 and validation[0] == pytest.approx(validation[1], rel=2e-5)


LONG = (
    "train.steps=800",
    "train.eval_every=none",
    "checkpoint.save_every=1000",
    "track.tensorboard=false",
    "track.console=off",
)


def wait_for_step(tiny: Tiny, process: subprocess.Popen, step: int) -> None:
    """Returns once `step` of the run "long" is logged."""
    path = tiny.directory("long") / "metrics.jsonl"
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        if path.exists() and any(row["step"] >= step for row in read_metrics(path)):
            return
        time.sleep(0.005)
    raise AssertionError(f"step {step} did not come")


@pytest.mark.slow
def test_signals_to_a_process(tiny: Tiny) -> None:
    """SIGTERM, then Ctrl-C, then to the end: the same losses as a process that was left alone."""
    assert ended(tiny.start(*LONG, "name=whole"), 300).code == 0
    done = 0
    for number, name in ((signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "SIGINT")):
        process = tiny.start(*LONG, "name=long")
        wait_for_step(tiny, process, done + 20)
        process.send_signal(number)
        found = ended(process)
        done = max(tiny.losses("long"))
        preempted(found, f"{tiny.directory('long')}: {name} {done} 800")
        assert (tiny.directory("long") / "checkpoints" / str(done)).is_dir()
    assert done < 800
    assert ended(tiny.start(*LONG, "name=long"), 300).code == 0
    assert tiny.losses("long") == tiny.losses("whole")


@pytest.mark.slow
def test_an_interrupt_before_the_first_step_leaves_at_once(tiny: Tiny) -> None:
    """Ctrl-C during the long first step: there is nothing to save, and what was there stays."""
    process = tiny.start(*LONG, "name=long")
    record = tiny.directory("long") / "run.json"
    deadline = time.monotonic() + 600
    while not record.exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    preempted(ended(process), "SIGINT", "nothing to save")
    assert contents(tiny.directory("long") / "checkpoints") == {}
