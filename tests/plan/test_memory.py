"""Memory of a step as the TPU compiler allots it: what it counts, kernels keep inside, and waits in host memory."""

import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxinfra.data.tokens import TokenData
from jaxinfra.models.remat import Remat
from jaxinfra.models.transformer import TransformerConfig
from jaxinfra.ops.attention import splash_block
from jaxinfra.optim.optimizers import OptimConfig
from jaxinfra.parallel.mesh import make_mesh
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.plan.aot import CompiledStep, Memory, compile_step, memory_usage, no_compilation_cache, program_on
from jaxinfra.plan.topology import parse_topology, set_up_compiler, topology_devices
from jaxinfra.run import Run
from jaxinfra.train.loop import TrainConfig
from tests.golden.compiled import DENSE

ON = parse_topology("v5p:2x2x1")
WIDTH = 4096
GIB = 2**30


def lowered(layers: int):
    """A step that gives its weights away, whose memory grows by the same bytes with every layer."""

    def loss(weights, x):
        def layer(x, w):
            return jnp.tanh(x @ jax.reshard(w, PartitionSpec())), None

        return jax.lax.scan(layer, x, weights)[0].sum()

    def step(weights, x):
        return weights - 1e-3 * jax.grad(loss)(weights, x)

    mesh = make_mesh(MeshConfig(fsdp=ON.num_devices), topology_devices(ON))
    with jax.set_mesh(mesh):
        shapes = (
            ((layers, WIDTH, WIDTH), PartitionSpec(None, "fsdp")),
            ((ON.num_devices * WIDTH, WIDTH), PartitionSpec("fsdp")),
        )
        given = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, at)) for shape, at in shapes]
        return jax.jit(step, donate_argnums=0).lower(*given)


def counted_gib(layers: int) -> float:
    with no_compilation_cache():
        memory = memory_usage(lowered(layers).compile())
    return (memory.total - memory.code) / GIB


def test_the_count_goes_on_where_the_compiler_refuses() -> None:
    set_up_compiler(ON)
    fewer, more = counted_gib(400), counted_gib(500)
    assert 1.2 * fewer < more < ON.chip.hbm_bytes / GIB
    with pytest.raises(jax.errors.JaxRuntimeError) as refused, no_compilation_cache():
        lowered(700).compile()
    said = re.search(r"required for HLO temporaries \(([\d.]+)G\)", str(refused.value))
    assert said, refused.value
    assert float(said[1]) == pytest.approx(more + 2 * (more - fewer), rel=2e-3)


LAYERS, VOCAB, ROWS = 2, 32768, 8
MODEL = TransformerConfig(
    vocab_size=VOCAB, layers=LAYERS, width=256, heads=2, kv_heads=1, head_dim=128, mlp_dim=512, remat="full"
)


def compiled(length: int, remat: Remat) -> tuple[CompiledStep, str]:
    """A step on four chips with its text."""
    run = Run(
        name="kernels",
        model=replace(MODEL, remat=remat),
        data=TokenData(store="none", seq_len=length),
        mesh=MeshConfig(fsdp=4),
        train=TrainConfig(global_batch=4 * ROWS),
    )
    texts: list[str] = []
    return compile_step(run, parse_topology("v5p:2x2x1"), dump=texts.append, on_progress=lambda line: None), texts[0]


def blocks(text: str) -> set[int]:
    """Sizes of the blocks of the attention kernels."""
    return {int(size) for size in re.findall(r"\bblock_(?:q|kv)\w*\W+(\d+)", text)}


@pytest.mark.slow
@pytest.mark.parametrize(("length", "remat", "forward"), [(640, "full", 2), (1024, "dots_and_attention", 1)], ids=str)
def test_splash_attention_runs_in_blocks_that_fit_the_length(length: int, remat: Remat, forward: int) -> None:
    """Once a layer and direction, and again only where the policy keeps nothing; logits are never whole."""
    found, text = compiled(length, remat)
    runs = {kernel.name: kernel.runs for kernel in found.kernels}
    assert {re.sub(r"_(no_)?(segmented|residuals)", "", name): n for name, n in runs.items()} == {
        "splash_mqa_fwd": forward * LAYERS,
        "splash_mqa_dq": LAYERS,
        "splash_mqa_dkv": LAYERS,
    }, runs
    assert blocks(text) == {splash_block(length)}
    assert found.memory.temporaries < 2 * ROWS * length * VOCAB


OFFLOADED_ON = parse_topology("v5e:2x2")
RUN = replace(
    DENSE,
    name="offload",
    model=replace(
        DENSE.model,
        vocab_size=8192,
        width=1024,
        heads=8,
        kv_heads=8,
        head_dim=128,
        mlp_dim=4096,
        layers=8,
        remat="full",
    ),
    mesh=MeshConfig(fsdp=4),
)
SMALL = replace(RUN, model=replace(RUN.model, vocab_size=1024, width=256, heads=2, kv_heads=2, mlp_dim=1024))
IN_HOST_MEMORY = "S(5)"
"""How the text marks the layout of an array there."""


@functools.cache
def allotted(of: Run, *, rows: int, offload: bool = False, remat: Remat = "full") -> tuple[Memory, bool]:
    """What is allotted, and whether the text has arrays in host memory."""
    run = replace(
        of,
        optim=OptimConfig(offload=offload),
        model=replace(of.model, remat=remat),
        train=TrainConfig(global_batch=rows),
    )
    texts: list[str] = []
    found = compile_step(run, OFFLOADED_ON, dump=texts.append, on_progress=lambda line: None)
    return found.memory, IN_HOST_MEMORY in texts[0]


@pytest.mark.slow
def test_state_of_the_optimiser_leaves_the_device() -> None:
    """Both moments of AdamW do; of what comes back only a few layers are there at once."""
    (here, marked), (away, moved) = (allotted(SMALL, rows=8, offload=offload) for offload in (False, True))
    assert moved and not marked and here.host == 0
    state = program_on(replace(SMALL, train=TrainConfig(global_batch=4)), OFFLOADED_ON).state
    moments = (
        sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state.opt_state) if a.ndim) // OFFLOADED_ON.num_devices
    )
    assert away.host == pytest.approx(moments, rel=0.01)
    assert here.arguments - away.arguments == pytest.approx(moments, rel=0.01)
    assert away.temporaries - here.temporaries < moments / 4


@pytest.mark.slow(75)
def test_what_layers_keep_leaves_the_device() -> None:
    """Six products a layer: queries, keys, values, the output of attention, gate and up.

    What is left is what the policy takes that keeps nothing.
    """
    (dots, marked), (away, moved) = (allotted(RUN, rows=128, remat=policy) for policy in ("dots", "offload"))
    full, _ = allotted(RUN, rows=128)
    assert moved and not marked and dots.host == 0
    model, tokens = RUN.model, 128 * RUN.data.seq_len // OFFLOADED_ON.num_devices
    kept = 2 * tokens * model.layers * (4 * model.width + 2 * model.mlp_dim)
    assert away.host == kept
    assert dots.temporaries - full.temporaries > 0.9 * kept
    assert away.temporaries - full.temporaries < 0.05 * kept
