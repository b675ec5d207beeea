import re
from dataclasses import replace
from pathlib import Path

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
from jaxinfra.plan.aot import Memory, compile_step, memory_usage, no_compilation_cache, program_on
from jaxinfra.plan.topology import parse_topology, set_up_compiler, topology_devices
from jaxinfra.run import Run, TrainConfig
from tests.decoders import changed, decoder
from tests.golden import proofs
from tests.golden.compiled import DENSE
from tests.golden.proofs import compiled_once

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


def kernels(length: int, remat: Remat) -> Run:
    """A run whose attention is in kernels, for four chips."""
    return Run(
        name="kernels",
        model=replace(MODEL, remat=remat),
        data=TokenData(store="none", seq_len=length),
        mesh=MeshConfig(fsdp=4),
        train=TrainConfig(global_batch=4 * BATCH_SIZE),
    )


def kernel_block_sizes(text: str) -> set[int]:
    return {int(size) for size in re.findall(r"\bblock_(?:q|kv)\w*\W+(\d+)", text)}


def check_kernels(length: int, run: Run, forward: int) -> None:
    texts: list[str] = []
    found = compile_step(run, V5P, dump=texts.append)
    runs = {kernel.name: kernel.runs for kernel in found.kernels}
    assert {re.sub(r"_(no_)?(segmented|residuals)", "", name): n for name, n in runs.items()} == {
        "splash_mqa_fwd": forward * LAYERS,
        "splash_mqa_dq": LAYERS,
        "splash_mqa_dkv": LAYERS,
    }, runs
    assert kernel_block_sizes(texts[0]) == {splash_block(length)}
    assert found.memory.temporaries < 2 * BATCH_SIZE * length * VOCAB


RECOMPUTED, SAVED = kernels(640, "full"), kernels(1024, "dots_and_attention")


@pytest.mark.slow(5)
@compiled_once((RECOMPUTED, V5P), (SAVED, V5P))
def test_splash_attention_block_size_and_runs() -> None:
    """Forward kernels run again only if the policy saves nothing; logits are never materialized at once."""
    check_kernels(640, RECOMPUTED, forward=2)
    check_kernels(1024, SAVED, forward=1)


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


def variant(base: Run, *, global_batch: int, offload: bool = False, remat: Remat = "full") -> Run:
    model, train = replace(base.model, remat=remat), TrainConfig(global_batch=global_batch)
    return replace(base, model=model, train=train, optim=OptimConfig(offload=offload))


def memory_of(run: Run) -> tuple[Memory, bool]:
    """Returns the memory of a step, and whether its HLO has arrays in host memory."""
    texts: list[str] = []
    compiled = compile_step(run, V5E, dump=texts.append)
    return compiled.memory, IN_HOST_MEMORY in texts[0]


ON_DEVICE, OFFLOADED = variant(SMALL, global_batch=8), variant(SMALL, global_batch=8, offload=True)


@pytest.mark.slow(5)
@compiled_once((ON_DEVICE, V5E), (OFFLOADED, V5E))
def test_offloaded_optimizer_state_leaves_the_device() -> None:
    """Both moments of AdamW leave it; only a few layers are copied back at a time."""
    on_device, marked = memory_of(ON_DEVICE)
    offloaded, marked_offloaded = memory_of(OFFLOADED)
    assert marked_offloaded and not marked and on_device.host == 0
    state = program_on(replace(SMALL, train=TrainConfig(global_batch=4)), V5E).state
    moments = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state.opt_state) if a.ndim) // V5E.num_devices
    assert offloaded.host == pytest.approx(moments, rel=0.01)
    assert on_device.arguments - offloaded.arguments == pytest.approx(moments, rel=0.01)
    assert offloaded.temporaries - on_device.temporaries < moments / 4


DOTS, DOTS_OFFLOADED, FULL = (variant(RUN, global_batch=128, remat=remat) for remat in ("dots", "offload", "full"))


@pytest.mark.slow(5)
@compiled_once((DOTS, V5E), (DOTS_OFFLOADED, V5E), (FULL, V5E))
def test_offloaded_activations_leave_the_device() -> None:
    """`dots` saves six matmuls per layer: query, key, value, attention output, gate and up."""
    dots, marked = memory_of(DOTS)
    offloaded, marked_offloaded = memory_of(DOTS_OFFLOADED)
    full, _ = memory_of(FULL)
    assert marked_offloaded and not marked and dots.host == 0
    model, tokens = RUN.model, 128 * RUN.data.seq_len // V5E.num_devices
    saved = 2 * tokens * model.num_layers * (4 * model.hidden_size + 2 * model.layers[0].mlp.dim)
    assert offloaded.host == saved
    assert dots.temporaries - full.temporaries > 0.9 * saved
    assert offloaded.temporaries - full.temporaries < 0.05 * saved


def test_a_test_is_run_again_if_its_programs_change(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runs = []

    def test_it() -> None:
        runs.append(1)

    monkeypatch.setattr(proofs, "PROOFS", tmp_path / "proofs.json")
    monkeypatch.setenv(proofs.RECORD, "1")
    for programs, expected in ((SMALL,), 1), ((SMALL,), 1), ((ON_DEVICE,), 2), ((SMALL, ON_DEVICE), 3):
        compiled_once(*((run, V5E) for run in programs))(test_it)()
        assert len(runs) == expected
