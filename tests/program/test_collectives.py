"""What the compiled train step sends over which mesh axes, and how often: gradients cross `replica` once a step.

Read from the text of XLA's CPU compiler, which makes a reduce-scatter an all-reduce and a slice.
"""

import functools
import math

import jax
import pytest

from jaxinfra.data.tokens import TokenData
from jaxinfra.objectives.causal_lm import CausalLM
from jaxinfra.parallel.mesh import make_mesh
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.plan.collectives import Collective, find_collectives, summarize
from jaxinfra.plan.hlo import HloModule
from jaxinfra.program import Program
from jaxinfra.run import Precision, Run, TrainConfig
from tests.decoders import decoder

ONE = MeshConfig(fsdp=1)
CUBE = MeshConfig(replica=2, fsdp=2, tensor=2)
FLAT = MeshConfig(replica=2, fsdp=4)
SUMS = 3
"""Scalars of the loss: cross-entropy, z-loss, weight."""

TABLE = """\
0 loops all-gather       fsdp            2 arrays   8192 bytes
0 loops all-reduce       fsdp            9 arrays     36 bytes
0 loops all-reduce       replica        12 arrays  32640 bytes
0 loops all-reduce       replica,fsdp    3 arrays     12 bytes
0 loops all-reduce       tensor          9 arrays     36 bytes
1 loops all-gather       tensor          2 arrays  32768 bytes
1 loops all-reduce       fsdp,tensor     1 arrays    512 bytes
1 loops all-reduce+slice fsdp            2 arrays  32768 bytes
1 loops all-reduce+slice tensor          2 arrays  32768 bytes
2 loops all-gather       fsdp            7 arrays 221184 bytes
2 loops all-gather       tensor          4 arrays 196608 bytes
2 loops all-reduce       fsdp,tensor     2 arrays   3072 bytes
2 loops all-reduce       tensor          3 arrays   1536 bytes
2 loops all-reduce+slice fsdp            7 arrays 221184 bytes
2 loops all-reduce+slice tensor          4 arrays 196608 bytes
"""
"""One loop is over microbatches, two are over layers in them. Of a layer, 7 matrices are gathered over fsdp and
their gradients scattered back; the gradients of its 2 norms are summed. The head is gathered out of
all loops and its gradient scattered once a microbatch; so is the embedding. At the top, over fsdp and tensor: the norm
of all gradients."""


def program(mesh: MeshConfig, accumulate: int) -> Program:
    run = Run(
        name="test",
        model=decoder(vocab_size=64, num_layers=3, hidden_size=32, num_heads=8, num_kv_heads=4, mlp_dim=64),
        objective=CausalLM(loss_chunks=2),
        data=TokenData(store="none", seq_len=16),
        precision=Precision(compute="float32"),
        mesh=mesh,
        train=TrainConfig(global_batch=32, accumulate=accumulate),
    )
    return Program(run, make_mesh(mesh, jax.devices()[: math.prod(mesh.sizes)]))


@functools.cache
def sent(mesh: MeshConfig, accumulate: int) -> list[Collective]:
    built = program(mesh, accumulate)
    text = built.lower().compile().as_text()
    return find_collectives(HloModule(text), dict(built.mesh.shape))


@pytest.mark.parametrize("accumulate", [4, 1])
@pytest.mark.parametrize("mesh", [CUBE, FLAT], ids=["cube", "flat"])
def test_gradients_cross_replica_once_a_step(mesh: MeshConfig, accumulate: int) -> None:
    """No loop crosses it; at the top the float32 gradient of every stored shard does, and the sums of the loss."""
    params = jax.tree.leaves(program(mesh, accumulate).params)
    shard_bytes = sorted(4 * math.prod(p.sharding.shard_shape(p.shape)) for p in params)
    crossing = [one for one in sent(mesh, accumulate) if "replica" in one.axes]
    assert {one.loops for one in crossing} == {0}
    arrays = sorted(size for one in crossing for size in one.array_bytes)
    assert arrays == [4] * SUMS + shard_bytes
    assert {one.kind for one in crossing} == {"all-reduce"}
    assert {one.axes for one in crossing if max(one.array_bytes) > 4} == {("replica",)}


def test_nothing_is_sent_that_the_table_does_not_name() -> None:
    """If a change is meant, or another compiler made it, put the new table in `TABLE`."""
    rows = (
        f"{row.loops} loops {row.kind:16} {','.join(row.axes):13} {row.arrays:3} arrays {row.bytes:6} bytes\n"
        for row in summarize(sent(CUBE, 4))
    )
    assert "".join(rows) == TABLE


def test_one_device_sends_nothing_not_even_to_itself() -> None:
    """Axes of one device cost nothing."""
    assert sent(ONE, 4) == []
