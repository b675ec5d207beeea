"""A mixture of experts computes the loss and every gradient of one device, wherever its experts are."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxinfra.models.latent import Latent
from jaxinfra.models.moe import Experts
from jaxinfra.ops.rope import Rope, YarnScaling
from jaxinfra.parallel.layout import Rules
from jaxinfra.parallel.mesh import MeshConfig
from jaxinfra.parallel.schedules import PipelineConfig
from jaxinfra.run import Run
from tests.parity.cases import (
    DOCUMENTS,
    Case,
    batch_on_host,
    gradients,
    on_host,
    put,
    too_different,
    values_on_host,
)

TIGHT = replace(
    DOCUMENTS,
    name="tight",
    model=replace(
        DOCUMENTS.model,
        layers=2,
        dropout=0.1,
        experts=Experts(
            count=8,
            chosen=3,
            dim=16,
            shared=1,
            score="sigmoid",
            scale=1.5,
            groups=4,
            chosen_groups=2,
            bias_rate=0.05,
            capacity_factor=1.1,
            balance_loss=0.5,
            z_loss=0.01,
        ),
    ),
)
"""All options, and experts that are full for a part of every sequence."""

LOOSE = replace(
    DOCUMENTS,
    name="loose",
    model=replace(DOCUMENTS.model, layers=2, mlp="gelu", experts=Experts(count=8, chosen=2, balance_loss=0.1)),
)
"""Mixtral's: a softmax, and nothing is dropped."""

SIGHTS = replace(
    TIGHT,
    name="sights",
    model=replace(TIGHT.model, dense_layers=1, layers=3, sights=("local", "global"), window=5),
)
"""Layers of two sights, uneven over two stages: some compute what nobody counts. One comes before, without experts."""

DEEPSEEK = replace(
    TIGHT,
    name="deepseek",
    model=replace(
        TIGHT.model,
        dense_layers=1,
        heads=8,
        kv_heads=None,
        head_dim=None,
        qk_norm=False,
        latent=Latent(kv_rank=16, q_rank=24, nope_dim=6, rope_dim=4, value_dim=10),
        rope=Rope(theta=100.0, scaling=YarnScaling(factor=4.0, original_length=64, beta_fast=4.0, mscale_all_dim=1.0)),
    ),
)
"""What DeepSeek-V3 is made of: latent attention, a dense layer first, biased sigmoids in groups, a shared expert."""

RUNS = {run.name: run for run in (TIGHT, LOOSE, SIGHTS, DEEPSEEK)}
STEP = 3


def found(case: Case) -> dict[str, np.ndarray]:
    """Every gradient and every sum, choices of each expert in each layer among them, with dropout."""
    program = case.program()
    params = put(values_on_host(program.specs), program.params)
    with program.on_mesh:
        batch = program.with_words(put(batch_on_host(case.run), program.batch), STEP)
        return on_host(program.gradients(params, batch))


@functools.cache
def on_one_device(name: str) -> dict[str, np.ndarray]:
    return found(Case(run=RUNS[name]))


def staged(run: Run, schedule: str, chunks: int = 1) -> Run:
    return replace(run, pipeline=PipelineConfig(schedule=schedule, chunks=chunks))


FAST = {
    "expert 8": Case(run=LOOSE, mesh=MeshConfig(fsdp=1, expert=8)),
    "expert, context, tensor": Case(
        run=TIGHT, mesh=MeshConfig(fsdp=1, expert=2, context=2, tensor=2), accumulate=2, shuffled=True
    ),
    "stage, replica, expert": Case(run=TIGHT, mesh=MeshConfig(replica=2, stage=2, fsdp=1, expert=2), accumulate=4),
}
SLOW = {
    "no expert axis": Case(run=TIGHT, mesh=MeshConfig(replica=2, fsdp=2, tensor=2), accumulate=2),
    "expert 2": Case(run=TIGHT, mesh=MeshConfig(fsdp=1, expert=2)),
    "expert 4": Case(run=TIGHT, mesh=MeshConfig(fsdp=1, expert=4), accumulate=4),
    "fsdp, expert": Case(run=TIGHT, mesh=MeshConfig(fsdp=2, expert=4), shuffled=True),
    "expert, tensor": Case(run=LOOSE, mesh=MeshConfig(fsdp=1, expert=4, tensor=2)),
    "expert, context": Case(run=TIGHT, mesh=MeshConfig(fsdp=1, expert=2, context=4)),
    "replica, expert": Case(run=LOOSE, mesh=MeshConfig(replica=4, fsdp=1, expert=2), accumulate=4),
    "stage, expert, context": Case(
        run=staged(TIGHT, "zero_bubble"), mesh=MeshConfig(stage=2, fsdp=1, expert=2, context=2), accumulate=2
    ),
    "uneven stages": Case(run=SIGHTS, mesh=MeshConfig(replica=2, stage=2, fsdp=1, expert=2), accumulate=2),
    "stage, expert, tensor": Case(
        run=staged(LOOSE, "gpipe"), mesh=MeshConfig(stage=2, fsdp=1, expert=2, tensor=2), accumulate=2
    ),
    "experts over fsdp": Case(
        run=replace(TIGHT, rules=Rules(experts=("fsdp", "expert"))), mesh=MeshConfig(fsdp=2, expert=4)
    ),
    "experts on every device": Case(run=replace(TIGHT, rules=Rules(experts=())), mesh=MeshConfig(fsdp=2, expert=4)),
    "DeepSeek, every axis of a slice": Case(
        run=DEEPSEEK, mesh=MeshConfig(fsdp=1, expert=2, context=2, tensor=2), accumulate=2
    ),
    "DeepSeek, stages": Case(run=DEEPSEEK, mesh=MeshConfig(stage=2, fsdp=2, expert=2), accumulate=4),
    "remat": Case(
        run=replace(TIGHT, model=replace(TIGHT.model, remat=("dots", "weights"))),
        mesh=MeshConfig(fsdp=2, expert=2, tensor=2),
    ),
}


@pytest.mark.parametrize("case", FAST.values(), ids=FAST)
def test_gradients_are_those_of_one_device(case: Case) -> None:
    assert not too_different(found(case), on_one_device(case.run.name))


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW.values(), ids=SLOW)
def test_gradients_are_those_of_one_device_in_more_ways(case: Case) -> None:
    assert not too_different(found(case), on_one_device(case.run.name))


@pytest.mark.parametrize("name", ["tight", "loose"])
def test_no_gradient_is_near_zero(name: str) -> None:
    """Else a relative difference would say nothing."""
    largest = {path: float(np.abs(one).max()) for path, one in on_one_device(name).items()}
    assert {path for path, size in largest.items() if size < 1e-3} == set()


def test_experts_are_full() -> None:
    """Else that nobody drops anything on any mesh would prove nothing."""
    sums = on_one_device("tight")
    load, kept = sums["[1]['expert_load']"], sums["[1]['expert_kept']"]
    assert load.shape == (2, 8) and load.sum() == 2 * 3 * 32 * 16
    assert 0.05 < 1 - kept.sum() / load.sum() < 0.5


def test_a_dense_model_takes_the_expert_axis_for_data() -> None:
    dense = Case(run=DOCUMENTS, mesh=MeshConfig(fsdp=2, expert=2, tensor=2), accumulate=2)
    assert not too_different(gradients(dense), gradients(Case(run=DOCUMENTS)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "accumulate"),
    [(MeshConfig(fsdp=2, expert=4), 1), (MeshConfig(replica=2, stage=2, fsdp=1, expert=2), 4)],
    ids=["fsdp-expert", "replica-stage-expert"],
)
def test_biases_move_alike_on_every_mesh(mesh: MeshConfig, accumulate: int) -> None:
    """By the choices of the whole step: of all microbatches, stages and replicas."""

    def biases(case: Case) -> tuple[np.ndarray, dict[str, float]]:
        program = case.program()
        with program.on_mesh:
            state = program.init(jax.random.key(0))
            for step in range(2):
                state, metrics = program.train_step(state, put(batch_on_host(case.run, seed=step), program.batch))
        return np.asarray(state.params["blocks"]["mlp"]["bias"]), {n: float(v) for n, v in metrics.items()}

    wanted, wanted_metrics = biases(Case(run=TIGHT))
    moved, metrics = biases(Case(run=TIGHT, mesh=mesh, accumulate=accumulate))
    assert np.array_equal(moved, wanted) and set(np.round(np.abs(wanted) / 0.05).flat) <= {0, 1, 2}
    assert metrics == pytest.approx(wanted_metrics, rel=1e-5)
