"""What the train step holds, by the compiler's own account."""

from dataclasses import replace
from typing import Any

import jax
import pytest

from jaxinfra.data.tokens import TokenData
from jaxinfra.models.transformer import TransformerConfig
from jaxinfra.parallel.mesh import MeshConfig, make_mesh
from jaxinfra.program import Program
from jaxinfra.run import Run
from jaxinfra.tasks.causal_lm import CausalLM
from jaxinfra.train.loop import TrainConfig

VOCAB, ROWS, LENGTH = 8192, 8, 64
RUN = Run(
    name="test",
    model=TransformerConfig(vocab_size=VOCAB, layers=1, width=8, heads=2, mlp_dim=8),
    task=CausalLM(loss_chunks=8),
    data=TokenData(store="none", seq_len=LENGTH),
    train=TrainConfig(global_batch=ROWS),
)


def temporaries_bytes(run: Run) -> int:
    devices = jax.devices()[: run.mesh.fsdp * run.mesh.tensor]
    return Program(run, make_mesh(run.mesh, devices)).lower().compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_step_never_holds_all_logits(tied: bool) -> None:
    run = replace(RUN, mesh=MeshConfig(fsdp=1), model=replace(RUN.model, tied=tied))
    logits_bytes = 4 * ROWS * LENGTH * VOCAB
    assert temporaries_bytes(run) < logits_bytes / 2


def test_a_step_with_one_chunk_does() -> None:
    run = replace(RUN, mesh=MeshConfig(fsdp=1), task=CausalLM(loss_chunks=1))
    assert temporaries_bytes(run) > 4 * ROWS * LENGTH * VOCAB


def test_a_device_of_a_mesh_never_holds_its_part() -> None:
    run = replace(RUN, mesh=MeshConfig(fsdp=2, tensor=2))
    assert temporaries_bytes(run) < 4 * ROWS * LENGTH * VOCAB / 4 / 2


@pytest.mark.slow
def test_a_pattern_of_policies_costs_what_lies_between_them() -> None:
    """Eight layers; every second, or every fourth, keeps the results of its products."""
    model = TransformerConfig(vocab_size=64, layers=8, width=64, heads=4, mlp_dim=256)
    data, train = TokenData(store="none", seq_len=256), TrainConfig(global_batch=16)
    run = replace(RUN, mesh=MeshConfig(fsdp=2), model=model, data=data, train=train)

    def temporaries(remat: Any) -> int:
        return temporaries_bytes(replace(run, model=replace(model, remat=remat)))

    full, dots = temporaries("full"), temporaries("dots")
    fourth, half = temporaries(("full", "full", "full", "dots")), temporaries(("full", "dots"))
    kept = dots - full
    assert full + kept / 8 < fourth < full + kept * 3 / 8
    assert full + kept * 3 / 8 < half < full + kept * 5 / 8
