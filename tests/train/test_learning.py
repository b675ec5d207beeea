"""The parts together learn: a task that only attention over a distance solves."""

import math

import jax
import numpy as np

from jaxinfra.data.tokens import TokenData
from jaxinfra.optim.config import OptimConfig
from jaxinfra.optim.optimizers import AdamW
from jaxinfra.optim.schedules import Linear
from jaxinfra.parallel.mesh import make_mesh
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.program import Program
from jaxinfra.run import Precision, Run, TrainConfig
from tests.decoders import decoder

WORDS, HALF, BATCH, STEPS = 16, 12, 32, 150
LENGTH = 2 * HALF - 1


def copies(draw: np.random.Generator, *, repeat: bool = True) -> dict[str, np.ndarray]:
    """Random words, then the same ones again; only the second half is judged."""
    first = draw.integers(0, WORDS, (BATCH, HALF), dtype=np.int32)
    second = first if repeat else draw.integers(0, WORDS, (BATCH, HALF), dtype=np.int32)
    ids = np.concatenate([first, second], axis=1)
    place = np.arange(LENGTH, dtype=np.int32)
    return {
        "inputs": ids[:, :-1],
        "targets": ids[:, 1:],
        "segments": np.ones((BATCH, LENGTH), np.int32),
        "positions": np.broadcast_to(place, (BATCH, LENGTH)),
        "weights": np.broadcast_to((place >= HALF - 1).astype(np.float32), (BATCH, LENGTH)),
    }


def test_copies() -> None:
    """The loss falls below 0.05 nats; where there is nothing to copy it is no better than a guess."""
    run = Run(
        name="copy",
        model=decoder(vocab_size=WORDS, num_layers=2, hidden_size=64, num_heads=4, mlp_dim=128),
        data=TokenData(store="none", seq_len=LENGTH),
        precision=Precision(compute="float32"),
        mesh=MeshConfig(fsdp=1),
        optim=OptimConfig(optimizer=AdamW(), schedule=Linear(warmup_steps=20), peak_lr=5e-3),
        train=TrainConfig(steps=STEPS, global_batch=BATCH),
    )
    program = Program(run, make_mesh(run.mesh, jax.devices()[:1]))
    shardings = {name: array.sharding for name, array in program.batch.items()}
    draw = np.random.default_rng(0)
    losses = []
    with program.on_mesh:
        state = program.init(jax.random.key(0))
        for _ in range(STEPS):
            state, metrics = program.train_step(state, jax.device_put(copies(draw), shardings))
            losses.append(float(metrics["loss"]))
        random = jax.device_put(copies(draw, repeat=False), shardings)
        sums = program.eval_step(state.params, random)
    assert losses[0] > 0.9 * math.log(WORDS)
    assert max(losses[-10:]) < 0.05
    assert float(sums["loss"] / sums["weight"]) > 0.9 * math.log(WORDS)
