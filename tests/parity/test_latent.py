"""Latent attention on meshes: loss and every gradient are those of one device."""

import functools
from dataclasses import replace

import numpy as np
import pytest

from jaxinfra.models.latent import Latent
from jaxinfra.ops.rope import Rope, YarnScaling
from jaxinfra.parallel.mesh import MeshConfig
from jaxinfra.run import Run
from tests.parity.cases import DOCUMENTS, Case, gradients, too_different

LATENT = replace(
    DOCUMENTS,
    name="latent",
    model=replace(
        DOCUMENTS.model,
        heads=8,
        kv_heads=None,
        head_dim=None,
        qk_norm=False,
        latent=Latent(kv_rank=16, q_rank=24, nope_dim=6, rope_dim=4, value_dim=10),
        rope=Rope(theta=100.0, scaling=YarnScaling(factor=4.0, original_length=64, beta_fast=4.0, mscale_all_dim=1.0)),
    ),
)
"""Documents, a tied head and weights of zero besides; positions pass a shard in two blocks."""


def across(form: str) -> Run:
    return replace(LATENT, model=replace(LATENT.model, context_attention=form))


@functools.cache
def on_one_device() -> dict[str, np.ndarray]:
    return gradients(Case(run=LATENT))


FAST = [
    Case(run=LATENT, mesh=MeshConfig(replica=2, fsdp=2, tensor=2), accumulate=2, shuffled=True),
    Case(run=across("ring"), mesh=MeshConfig(fsdp=2, context=2, tensor=2)),
    Case(run=LATENT, mesh=MeshConfig(stage=2, fsdp=2, tensor=2), accumulate=2),
]
SLOW = [
    Case(run=LATENT, mesh=MeshConfig(fsdp=8)),
    Case(run=LATENT, mesh=MeshConfig(fsdp=1, tensor=8), accumulate=2),
    Case(run=across("gather"), mesh=MeshConfig(fsdp=1, context=4, tensor=2)),
    Case(run=across("ring"), mesh=MeshConfig(fsdp=1, context=8)),
    Case(run=across("gather"), mesh=MeshConfig(stage=2, fsdp=1, context=2, tensor=2), accumulate=4),
    Case(run=LATENT, mesh=MeshConfig(replica=2, stage=2, fsdp=2), accumulate=4),
]


@pytest.mark.parametrize("case", FAST, ids=str)
def test_gradients_are_those_of_one_device(case: Case) -> None:
    assert not too_different(gradients(case), on_one_device())


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=str)
def test_gradients_are_those_of_one_device_on_more_meshes(case: Case) -> None:
    assert not too_different(gradients(case), on_one_device())


def test_no_gradient_is_near_zero() -> None:
    """Else a relative difference would say nothing."""
    largest = {path: float(np.abs(one).max()) for path, one in on_one_device().items()}
    assert {path for path, size in largest.items() if size < 1e-3 and "z_loss" not in path} == set()
