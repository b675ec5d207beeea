"""A mixture of experts is trained on a mesh, logged, saved, resumed on another mesh, and sampled."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxinfra.inference.sampler import Sampler, SamplingParams
from jaxinfra.inference.sampling_program import sampling_program
from jaxinfra.inference.trained_params import load_params
from jaxinfra.processes.peers import Peers
from jaxinfra.track.jsonl import read_metrics
from tests.tiny_run import Tiny

MIXTURE = (
    "model.layers.mlp=mixture_of_experts",
    "model.layers.mlp.num_experts=4",
    "model.layers.mlp.dim=32",
    "model.layers.mlp.bias_update_rate=0.01",
    "model.layers.mlp.balance_loss=0.01",
    "name=mixture",
    "train.eval_every=none",
    "train.eval_samples=8",
    "track.console=off",
)


def test_from_the_first_step_to_text(tiny: Tiny) -> None:
    directory = tiny.directory("mixture")
    assert tiny.launch(*MIXTURE, "mesh.fsdp=2", "mesh.expert=4").code == 0
    shutil.rmtree(directory / "checkpoints" / "12")
    assert tiny.launch(*MIXTURE, "mesh.fsdp=4", "mesh.tensor=2").code == 0
    rows = [row for row in read_metrics(directory / "metrics.jsonl") if "loss" in row]
    assert [int(row["step"]) for row in rows][-1] == 12 and rows[-1]["loss"] < rows[0]["loss"]
    assert all(sum(row[f"expert_load/{e}"] for e in range(4)) == pytest.approx(4) for row in rows)
    assert all(row["expert_dropped"] == 0 and row["expert_load_max"] >= 1 and row["balance_loss"] > 0 for row in rows)
    check_greedy(directory)


def check_greedy(directory: Path) -> None:
    """Word by word from a cache with sharded experts, each is the likeliest after reading all before it anew."""
    sampler = Sampler.from_run(directory, (), ["mesh.expert=4", "mesh.tensor=1", "mesh.fsdp=2"])
    prompts = [sampler.model.encode(prompt) for prompt in ("w1 w7 w50", "w3")]
    steps = [*sampler.tokens(prompts, max_tokens=12, sampling=SamplingParams(temperature=0.0))]
    program = sampling_program(sampler.model.run, jax.devices()[:1])
    params = load_params(directory, program, Peers()).params
    with program.on_mesh:
        model = program.model(params)
        logits = jax.jit(lambda ids: model({"inputs": ids}).materialize())
        for prompt, found in zip(prompts, zip(*steps, strict=True), strict=True):
            ids = np.array([[*prompt, *found]], np.int32)
            assert np.asarray(logits(ids))[0].argmax(-1)[len(prompt) - 1 : -1].tolist() == [*found]
