"""In canonical mode losses and states are the same bits on every mesh, and those of a plain step up to rounding."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from jaxinfra.config import validate
from jaxinfra.optim.optimizers import AdamW
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.program import Program
from jaxinfra.run import Run
from tests.bench import merge_overrides
from tests.parity.cases import DOCUMENTS, MEAN, TIGHT, batch_on_host, make_program, put_like
from tests.parity.conftest import Unless
from tests.refusals import mended, problem
from tests.tiny_run import Tiny
from tests.tiny_run import tiny as tiny
from tests.tiny_run import tiny_data as tiny_data

SHARDS, STEPS = 8, 4
FSDP = MeshConfig(fsdp=8)


def small(run: Run) -> Run:
    """The run with Adam as it is used, and with global batches of eight virtual shards of two rows."""
    return replace(
        run,
        optim=replace(run.optim, optimizer=AdamW(), peak_lr=0.01),
        train=replace(run.train, global_batch=2 * SHARDS),
    )


def program(run: Run, mesh: MeshConfig, canonical: int | None = SHARDS) -> Program:
    run = replace(run, mesh=mesh, train=replace(run.train, canonical=canonical))
    validate(run)
    return make_program(run)


def train(program: Program, state: Any = None, steps: Sequence[int] = range(STEPS)) -> tuple[list[str], Any]:
    """Trains; returns the bits of losses and norms, and of the sums of an evaluation, and the state on the host."""
    bits = []
    with program.on_mesh:
        state = program.init(jax.random.key(0)) if state is None else put_like(state, program.state)
        for step in steps:
            rows = {name: x[: program.run.train.global_batch] for name, x in batch_on_host(program.run, step).items()}
            batch = put_like(rows, {name: program.validation_batch[name] for name in rows})
            state, metrics = program.train_step(state, batch)
            bits += [np.float32(metrics[name]).tobytes().hex() for name in ("loss", "grad_norm")]
        bits += [np.asarray(value).tobytes().hex() for value in program.eval_step(state.params, batch).values()]
    return bits, jax.tree.map(np.asarray, state)


def sha256(state: Any) -> str:
    return hashlib.sha256(b"".join(leaf.tobytes() for leaf in jax.tree.leaves(state))).hexdigest()


def on_meshes(run: Run, meshes: Sequence[MeshConfig]) -> list[Program]:
    return [program(run, mesh) for mesh in meshes]


USED = ("init", "eval_step")
"""What `train` calls besides the train step."""


def assert_same_bits(first: Program, *others: Program, steps: Sequence[int]) -> None:
    bits, state = train(first, steps=steps)
    for each in others:
        found, other = train(each, steps=steps)
        assert found == bits and sha256(other) == sha256(state), each.run.mesh


@pytest.mark.slow(70)
def test_bits_are_those_of_every_mesh(all_optimizations: None, unless_proven: Unless) -> None:
    """Compiled as for a user: only then does the compiler fuse products and sums, on some shapes."""
    run = small(DOCUMENTS)
    meshes = (
        FSDP,
        MeshConfig(fsdp=4, replica=2),
        MeshConfig(fsdp=1, tensor=8),
        MeshConfig(fsdp=1, expert=2, context=2),
        MeshConfig(fsdp=1, stage=2),
        MeshConfig(fsdp=1),
    )
    programs = on_meshes(run, meshes)
    unless_proven(lambda: assert_same_bits(*programs, steps=range(STEPS)), *programs, also=USED)


@pytest.mark.slow(20)
@pytest.mark.parametrize("run", [TIGHT, MEAN], ids=lambda run: run.name)
def test_experts_images_and_dropout_have_the_bits_of_another_mesh(run: Run, unless_proven: Unless) -> None:
    """Experts drop choices and have statistics and biases."""
    programs = on_meshes(small(run), (FSDP, MeshConfig(fsdp=2, replica=2)))
    unless_proven(lambda: assert_same_bits(*programs, steps=range(2)), *programs, also=USED)


def test_a_state_goes_on_bit_for_bit_on_another_mesh(unless_proven: Unless) -> None:
    """Plain training does not, so this test can fail; both agree up to rounding."""
    run, there = small(DOCUMENTS), MeshConfig(fsdp=2, tensor=2)
    here, moved = program(run, FSDP), program(run, there)
    plain_here, plain_moved = program(run, FSDP, canonical=None), program(run, there, canonical=None)

    def check() -> None:
        first, rest = range(2), range(2, STEPS)
        _, middle = train(here, steps=first)
        bits, state = train(here, middle, rest)
        found, other = train(moved, middle, rest)
        assert found == bits and sha256(other) == sha256(state)
        plain, plain_state = train(plain_here, middle, rest)
        changed, changed_state = train(plain_moved, middle, rest)
        assert changed != plain and sha256(changed_state) != sha256(plain_state)
        losses = [[np.frombuffer(bytes.fromhex(each), np.float32)[0] for each in side] for side in (plain, bits)]
        np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)

    unless_proven(check, here, moved, plain_here, plain_moved, also=USED)


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
