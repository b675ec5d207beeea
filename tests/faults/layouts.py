"""Rows 28 to 31: a run that goes on with other processes, devices and layouts."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from jaxinfra.checkpoint.disk_steps import DiskSteps
from jaxinfra.checkpoint.manager import CheckpointManager
from jaxinfra.config import load
from jaxinfra.parallel.mesh import make_mesh
from jaxinfra.parallel.spec import leaf_name
from jaxinfra.program import Program
from jaxinfra.run import Run, with_mesh_size
from tests.faults.harness import CONFIG_MODULE, Harness, named, require
from tests.faults.matrix import row

_CLOSE, _STEPS = 1e-6, 20


def begun(harness: Harness, name: str, *, processes: int, devices: int) -> None:
    """Copies the first thirty steps of the run that nothing happened to, with this layout."""
    harness.reference(processes=processes, devices=devices)
    source, run = harness.reference_run(processes=processes, devices=devices), harness.run(name)
    shutil.copytree(source.path, run.path, ignore=shutil.ignore_patterns("lease", "goodput.jsonl"))
    for path in source.reads.iterdir():
        lines = [line for line in path.read_text().splitlines(keepends=True) if int(line.split()[0]) <= 30]
        (run.reads / path.name).write_text("".join(lines))
    (run.path / "summary.json").unlink()
    for step in run.steps():
        if step > 30:
            shutil.rmtree(run.checkpoints / str(step))


def _goes_on(harness: Harness, name: str, *words: str, start: tuple[int, int], to: tuple[int, int]) -> float:
    """Goes on with another layout; returns the largest relative difference of a loss in the next steps."""
    begun(harness, name, processes=start[0], devices=start[1])
    ended = harness.train(name, *words, processes=to[0], devices=to[1])
    require(ended.code == 0, ended)
    named(ended.out, "at step 30 of")
    expected, run = harness.reference(processes=start[0], devices=start[1]), harness.run(name)
    require(run.samples() == expected.samples, f"{name}: other samples")
    losses, worst = run.losses(), 0.0
    for step in range(31, 31 + _STEPS):
        ours, theirs = float.fromhex(losses[step]), float.fromhex(expected.losses[step])
        worst = max(worst, abs(ours - theirs) / abs(theirs))
    require(worst <= _CLOSE, f"{name}: a loss differs by {worst:.1e}")
    return worst


@row(28, fault="resumed with another number of processes", must="same samples, losses within 1e-6 for 20 steps")
def other_processes(harness: Harness) -> str:
    """Goes on from two processes with four, and with one."""
    worst = [_goes_on(harness, f"two-to-{count}", start=(2, 2), to=(count, count)) for count in (4, 1)]
    return f"2 to 4 processes, and to 1: same samples, losses within {max(worst):.1e}"


@row(29, fault="resumed with another number of devices", must="same samples, losses within 1e-6 for 20 steps")
def other_devices(harness: Harness) -> str:
    """Goes on from one device with eight."""
    worst = _goes_on(harness, "one-to-eight", start=(1, 1), to=(1, 8))
    return f"1 to 8 devices: same samples, losses within {worst:.1e}"


@row(
    30,
    fault="resumed with another layout: fsdp, tensor, stage, mixtures",
    must="restored arrays bit-equal on each; same samples, losses within 1e-6 for 20 steps",
)
def other_layouts(harness: Harness) -> str:
    """Restores on meshes of eight devices, and goes on with a mixture."""
    harness.reference()
    run = harness.reference_run()
    meshes: list[Sequence[str]] = [
        ("mesh.fsdp=8",),
        ("mesh.tensor=4", "mesh.fsdp=2"),
        ("mesh.stage=2", "mesh.fsdp=4"),
        ("mesh.replica=2", "mesh.stage=2", "mesh.tensor=2", "mesh.fsdp=1"),
        ("mesh.replica=2", "mesh.context=2", "mesh.fsdp=2"),
    ]
    for overrides in meshes:
        _restores_bits(run.path, 30, overrides)
    mixture = ("mesh.tensor=2", "mesh.stage=2", "mesh.fsdp=2")
    worst = _goes_on(harness, "mixture", *mixture, start=(1, 1), to=(1, 8))
    return f"bit-equal on {len(meshes)} meshes; tensor, stage and fsdp: same samples, losses within {worst:.1e}"


def _restores_bits(path: Path, step: int, overrides: Sequence[str]) -> None:
    """Restores a checkpoint on a mesh of this process's devices, and compares each array with what is stored."""
    run = with_mesh_size(load(path / "run.json", overrides, Run, [CONFIG_MODULE]).run, 8)
    program = Program(run, make_mesh(run.mesh, jax.devices()[: math.prod(run.mesh.sizes)]))
    with program.on_mesh, CheckpointManager(path / "checkpoints", read_only=True) as checkpoints:
        state = checkpoints.restore(step, program.state)
    stored = DiskSteps(path / "checkpoints")
    manifest = stored.manifest(step)
    for key_path, leaf in jax.tree.leaves_with_path(state):
        name = leaf_name(key_path)
        expected = stored.read_leaf(step, manifest, name)
        require(np.asarray(leaf).tobytes() == expected.tobytes(), f"{overrides}: {name} has other bits")


@row(31, fault="shrunk and grown again", must="as 30; with train.canonical=8 the same bits to the end")
def shrink_and_grow(harness: Harness) -> str:
    """Goes from two processes to one device and to eight, in canonical mode."""
    words, name = ("train.canonical=8",), "canonical"
    layouts = (2, 2, "step:0:14:term"), (1, 1, "step:0:35:term"), (1, 8, "")
    for processes, devices, fail in layouts:
        mesh = ("mesh.tensor=2", "mesh.fsdp=-1") if devices == 8 else ()
        ended = harness.train(name, *words, *mesh, processes=processes, devices=devices, fail=fail)
        require(ended.code == (75 if fail else 0), ended)
    text = harness.same_bits(name, harness.reference(*words, devices=2))
    return f"2 processes, 1 device, 8 devices: {text} in canonical mode; without it as 28 and 30"
