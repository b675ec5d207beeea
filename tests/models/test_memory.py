"""The memory of a train step, as the compiler reports it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from jaxinfra.data.tokens import TokenData
from jaxinfra.objectives.causal_lm import CausalLM
from jaxinfra.parallel.mesh import make_mesh
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.program import Program
from jaxinfra.run import Run, TrainConfig
from tests.decoders import decoder

VOCAB, ROWS, LENGTH = 8192, 8, 64
RUN = Run(
    name="test",
    model=decoder(vocab_size=VOCAB, num_layers=1, hidden_size=8, num_heads=2, mlp_dim=8),
    objective=CausalLM(loss_chunks=8),
    data=TokenData(store="none", seq_len=LENGTH),
    train=TrainConfig(global_batch=ROWS),
)


def temporaries_bytes(run: Run) -> int:
    devices = jax.devices()[: run.mesh.fsdp * run.mesh.tensor]
    return Program(run, make_mesh(run.mesh, devices)).lower().compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_step_never_holds_all_logits(tied: bool) -> None:
    run = replace(RUN, mesh=MeshConfig(fsdp=1), model=replace(RUN.model, tie_embeddings=tied))
    logits_bytes = 4 * ROWS * LENGTH * VOCAB
    assert temporaries_bytes(run) < logits_bytes / 2


def test_a_step_with_one_chunk_holds_them() -> None:
    run = replace(RUN, mesh=MeshConfig(fsdp=1), objective=CausalLM(loss_chunks=1))
    assert temporaries_bytes(run) > 4 * ROWS * LENGTH * VOCAB


def test_no_device_of_a_mesh_holds_its_part_of_the_logits() -> None:
    run = replace(RUN, mesh=MeshConfig(fsdp=2, tensor=2))
    assert temporaries_bytes(run) < 4 * ROWS * LENGTH * VOCAB / 4 / 2


def temporaries_of_policies() -> list[int]:
    """Measures eight layers that keep nothing, all matmul outputs, those of every fourth layer, and of every second."""
    model = decoder(vocab_size=64, num_layers=8, hidden_size=64, num_heads=4, mlp_dim=256)
    data, train = TokenData(store="none", seq_len=256), TrainConfig(global_batch=16)
    run = replace(RUN, mesh=MeshConfig(fsdp=2), model=model, data=data, train=train)
    policies = ("full", "dots", ("full", "full", "full", "dots"), ("full", "dots"))
    return [temporaries_bytes(replace(run, model=replace(model, remat=remat))) for remat in policies]


@pytest.mark.slow
def test_a_pattern_of_policies_costs_a_part_of_their_difference() -> None:
    """In a process of its own: with the schedule that emulated devices need to run, XLA holds more than it must."""
    code = "import json; from tests.models.test_memory import *; print(json.dumps(temporaries_of_policies()))"
    root, default = Path(__file__).parents[2], {**os.environ, "XLA_FLAGS": ""}
    printed = subprocess.run([sys.executable, "-c", code], cwd=root, env=default, check=True, stdout=subprocess.PIPE)
    full, dots, fourth, half = json.loads(printed.stdout)
    kept = dots - full
    assert full + kept / 8 < fourth < full + kept * 3 / 8
    assert full + kept * 3 / 8 < half < full + kept * 5 / 8
