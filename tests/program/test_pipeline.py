"""What a pipeline keeps, sends and refuses, as compiled."""

import functools
import math

import jax

from jaxinfra.data.tokens import TokenData
from jaxinfra.parallel.mesh import make_mesh
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.parallel.schedules import PipelineConfig
from jaxinfra.plan.collectives import Collective, find_collectives
from jaxinfra.plan.hlo import HloModule
from jaxinfra.program import Program
from jaxinfra.run import Precision, Run, TrainConfig
from tests.decoders import decoder

ROWS, LENGTH, WIDTH = 8, 128, 128
CUBE = MeshConfig(replica=2, stage=2, fsdp=2)
SUMS = 3
"""Scalars of the loss: cross-entropy, z-loss, weight."""


def program_of(microbatches: int, pipeline: PipelineConfig, mesh: MeshConfig) -> Program:
    """A program of microbatches of `ROWS` rows each."""
    run = Run(
        name="test",
        model=decoder(vocab_size=64, num_layers=4, hidden_size=WIDTH, num_heads=2, mlp_dim=128, remat="full"),
        data=TokenData(store="none", seq_len=LENGTH, mask_documents=False),
        precision=Precision(compute="float32"),
        mesh=mesh,
        pipeline=pipeline,
        train=TrainConfig(global_batch=ROWS * microbatches, accumulate=microbatches),
    )
    return Program(run, make_mesh(mesh, jax.devices()[: math.prod(mesh.sizes)]))


def temporaries_bytes(microbatches: int, schedule: str) -> int:
    pipeline = PipelineConfig(schedule="gpipe" if schedule == "gpipe" else "1f1b")
    found = program_of(microbatches, pipeline, MeshConfig(stage=4, fsdp=1)).lower().compile().memory_analysis()
    assert found is not None
    return found.temp_size_in_bytes


def test_1f1b_needs_as_much_memory_however_many_microbatches_there_are() -> None:
    """But for the words of the batch, two int32 a token; GPipe keeps the stream at the start of every stage too."""
    words, stream = 2 * 4 * ROWS * LENGTH, 4 * ROWS * LENGTH * WIDTH
    more = temporaries_bytes(128, "1f1b") - temporaries_bytes(8, "1f1b")
    assert more <= 2 * 120 * words and more < 2 * stream
    assert temporaries_bytes(32, "gpipe") - temporaries_bytes(8, "gpipe") >= 24 * stream


@functools.cache
def sent() -> list[Collective]:
    program = program_of(4, PipelineConfig(), CUBE)
    return find_collectives(HloModule(program.lower().compile().as_text()), dict(program.mesh.shape))


def test_gradients_cross_replica_once_a_step_in_a_pipeline_too() -> None:
    """Every array as it is stored: of embedding and head what a stage keeps, not the whole."""
    params = jax.tree.leaves(program_of(4, PipelineConfig(), CUBE).params)
    kept = [4 * math.prod(p.sharding.shard_shape(p.shape)) for p in params]
    crossing = [one for one in sent() if "replica" in one.axes]
    assert {one.loops for one in crossing} == {0}
    assert sorted(size for one in crossing for size in one.array_bytes) == sorted([4] * SUMS + kept)


def test_a_tick_sends_the_stream_up_and_its_gradient_down() -> None:
    """One microbatch of a device's rows either way, and no more."""
    stream = 4 * (ROWS // 4) * LENGTH * WIDTH
    moved = [one for one in sent() if one.kind == "collective-permute" and one.axes == ("stage",)]
    assert {one.array_bytes for one in moved} == {(stream,)}
    ticks = 4 + CUBE.stage - 1
    assert 2 * ticks - 2 <= sum(one.runs for one in moved) <= 2 * ticks
