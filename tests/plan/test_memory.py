import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxinfra.data.tokens import TokenData
from jaxinfra.models.remat import Remat
from jaxinfra.ops.attention import splash_block
from jaxinfra.optim.config import OptimConfig
from jaxinfra.parallel.mesh import make_mesh
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.plan.aot import CompiledStep, Memory, compile_step, memory_usage, no_compilation_cache, program_on
from jaxinfra.plan.topology import parse_topology, set_up_compiler, topology_devices
from jaxinfra.run import Run, TrainConfig
from tests.decoders import changed, decoder
from tests.golden.compiled import DENSE

V5P = parse_topology("v5p:2x2x1")
WIDTH = 4096
GIB = 2**30


def lower_step(layers: int):
    """Lowers a step that donates its weights; its memory grows linearly with its layers."""

    def loss(weights, x):
        def layer(x, w):
            return jnp.tanh(x @ jax.reshard(w, PartitionSpec())), None

        return jax.lax.scan(layer, x, weights)[0].sum()

    def step(weights, x):
        return weights - 1e-3 * jax.grad(loss)(weights, x)

    mesh = make_mesh(MeshConfig(fsdp=V5P.num_devices), topology_devices(V5P))
    with jax.set_mesh(mesh):
        shapes = (
            ((layers, WIDTH, WIDTH), PartitionSpec(None, "fsdp")),
            ((V5P.num_devices * WIDTH, WIDTH), PartitionSpec("fsdp")),
        )
        given = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, at)) for shape, at in shapes]
        return jax.jit(step, donate_argnums=0).lower(*given)


def allocated_gib(layers: int) -> float:
    with no_compilation_cache():
        memory = memory_usage(lower_step(layers).compile())
    return (memory.total - memory.code) / GIB


def test_total_is_what_the_compiler_compares_with_its_limit() -> None:
    set_up_compiler(V5P)
    fewer, more = allocated_gib(400), allocated_gib(500)
    assert 1.2 * fewer < more < V5P.chip.hbm_bytes / GIB
    with pytest.raises(jax.errors.JaxRuntimeError) as error, no_compilation_cache():
        lower_step(700).compile()
    required = re.search(r"required for HLO temporaries \(([\d.]+)G\)", str(error.value))
    assert required, error.value
    assert float(required[1]) == pytest.approx(more + 2 * (more - fewer), rel=2e-3)


LAYERS, VOCAB, BATCH_SIZE = 2, 32768, 8
MODEL = decoder(
    vocab_size=VOCAB,
    num_layers=LAYERS,
    hidden_size=256,
    num_heads=2,
    num_kv_heads=1,
    head_dim=128,
    mlp_dim=512,
    remat="full",
)


def compile_with_text(length: int, remat: Remat) -> tuple[CompiledStep, str]:
    """Compiles a step for four chips; returns its HLO, too."""
    run = Run(
        name="kernels",
        model=replace(MODEL, remat=remat),
        data=TokenData(store="none", seq_len=length),
        mesh=MeshConfig(fsdp=4),
        train=TrainConfig(global_batch=4 * BATCH_SIZE),
    )
    texts: list[str] = []
    return compile_step(run, V5P, dump=texts.append), texts[0]


def kernel_block_sizes(text: str) -> set[int]:
    return {int(size) for size in re.findall(r"\bblock_(?:q|kv)\w*\W+(\d+)", text)}


@pytest.mark.slow
@pytest.mark.parametrize(("length", "remat", "forward"), [(640, "full", 2), (1024, "dots_and_attention", 1)], ids=str)
def test_splash_attention_block_size_and_runs(length: int, remat: Remat, forward: int) -> None:
    """Forward kernels run again only if the policy saves nothing; logits are never materialized at once."""
    found, text = compile_with_text(length, remat)
    runs = {kernel.name: kernel.runs for kernel in found.kernels}
    assert {re.sub(r"_(no_)?(segmented|residuals)", "", name): n for name, n in runs.items()} == {
        "splash_mqa_fwd": forward * LAYERS,
        "splash_mqa_dq": LAYERS,
        "splash_mqa_dkv": LAYERS,
    }, runs
    assert kernel_block_sizes(text) == {splash_block(length)}
    assert found.memory.temporaries < 2 * BATCH_SIZE * length * VOCAB


V5E = parse_topology("v5e:2x2")
RUN = replace(
    DENSE,
    name="offload",
    model=changed(
        DENSE.model,
        vocab_size=8192,
        hidden_size=1024,
        num_heads=8,
        num_kv_heads=8,
        head_dim=128,
        mlp_dim=4096,
        num_layers=8,
        remat="full",
    ),
    mesh=MeshConfig(fsdp=4),
)
SMALL = replace(
    RUN, model=changed(RUN.model, vocab_size=1024, hidden_size=256, num_heads=2, num_kv_heads=2, mlp_dim=1024)
)
IN_HOST_MEMORY = "S(5)"
"""Layout of an array in host memory, in HLO."""


@functools.cache
def memory_of(base: Run, *, offload: bool = False, remat: Remat = "full", global_batch: int) -> tuple[Memory, bool]:
    """Returns the memory of a step, and whether its HLO has arrays in host memory."""
    model, train = replace(base.model, remat=remat), TrainConfig(global_batch=global_batch)
    run = replace(base, model=model, train=train, optim=OptimConfig(offload=offload))
    texts: list[str] = []
    compiled = compile_step(run, V5E, dump=texts.append)
    return compiled.memory, IN_HOST_MEMORY in texts[0]


@pytest.mark.slow
def test_offloaded_optimizer_state_leaves_the_device() -> None:
    """Both moments of AdamW leave it; only a few layers are copied back at a time."""
    on_device, marked = memory_of(SMALL, global_batch=8)
    offloaded, marked_offloaded = memory_of(SMALL, global_batch=8, offload=True)
    assert marked_offloaded and not marked and on_device.host == 0
    state = program_on(replace(SMALL, train=TrainConfig(global_batch=4)), V5E).state
    moments = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state.opt_state) if a.ndim) // V5E.num_devices
    assert offloaded.host == pytest.approx(moments, rel=0.01)
    assert on_device.arguments - offloaded.arguments == pytest.approx(moments, rel=0.01)
    assert offloaded.temporaries - on_device.temporaries < moments / 4


@pytest.mark.slow(75)
def test_offloaded_activations_leave_the_device() -> None:
    """`dots` saves six matmuls per layer: query, key, value, attention output, gate and up."""
    dots, marked = memory_of(RUN, global_batch=128, remat="dots")
    offloaded, marked_offloaded = memory_of(RUN, global_batch=128, remat="offload")
    full, _ = memory_of(RUN, global_batch=128)
    assert marked_offloaded and not marked and dots.host == 0
    model, tokens = RUN.model, 128 * RUN.data.seq_len // V5E.num_devices
    saved = 2 * tokens * model.num_layers * (4 * model.hidden_size + 2 * model.layers[0].mlp.dim)
    assert offloaded.host == saved
    assert dots.temporaries - full.temporaries > 0.9 * saved
    assert offloaded.temporaries - full.temporaries < 0.05 * saved
