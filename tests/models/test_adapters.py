"""Adapters and packed weights on every kind of mesh, and what they compute."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra.data.tokens import TokenData
from jaxinfra.errors import ConfigError
from jaxinfra.models.adapter import Lora
from jaxinfra.models.low_rank import using_columns
from jaxinfra.models.moe import MixtureOfExperts
from jaxinfra.parallel.mesh import make_mesh
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.parallel.spec import leaf_name, leaves_by_name, nested
from jaxinfra.program import Program, TrainState
from jaxinfra.run import Precision, Run, TrainConfig
from tests.decoders import decoder
from tests.models.harness import LATENT, relative_error

MESHES = {
    "tensor": MeshConfig(fsdp=2, tensor=2),
    "context": MeshConfig(replica=2, fsdp=1, context=2),
    "expert": MeshConfig(fsdp=1, expert=2, tensor=2),
    "stage": MeshConfig(stage=2, fsdp=1, tensor=2),
    "canonical": MeshConfig(fsdp=4),
}
ALONE = MeshConfig(fsdp=1)


def run_on(name: str, *, frozen: Any, experts: bool, dora: bool) -> Run:
    mesh = MESHES.get(name, ALONE)
    model = decoder(vocab_size=64, num_layers=2, hidden_size=64, num_heads=4, num_kv_heads=4, mlp_dim=128)
    if experts:
        layer = replace(model.layers[0], mlp=MixtureOfExperts(dim=32, num_experts=4, top_k=2))
        model = replace(model, layers=(layer,))
    train = TrainConfig(global_batch=8, accumulate=mesh.stage, canonical=8 if name == "canonical" else None)
    return Run(
        name="adapter",
        model=model,
        data=TokenData(store="none", seq_len=16),
        init="runs/base",
        adapter=Lora(rank=4, dora=dora),
        precision=Precision(compute="float32", frozen=frozen),
        mesh=mesh,
        train=train,
    )


def program_of(run: Run) -> Program:
    return Program(run, make_mesh(run.mesh, jax.devices()[: np.prod(run.mesh.sizes)]))


def first_state(program: Program) -> TrainState:
    """The state with a base of random numbers, and adapters that change what it computes."""
    with program.base.on_mesh:
        base = program.base.init(jax.random.key(0)).params
    leaves = [program.from_base(*each) for each in leaves_by_name(base).items()]
    with program.on_mesh:
        state = program.init_from(nested({path: leaf for each in leaves for path, leaf in each.items()}))

        def changed(path: jax.tree_util.KeyPath, leaf: jax.Array) -> jax.Array:
            kind = leaf_name(path).rpartition(".")[2]
            noise = jax.random.normal(jax.random.key(1), leaf.shape, out_sharding=jax.typeof(leaf).sharding.spec)
            return leaf + 0.1 * noise if kind in ("b", "magnitude") else leaf

        return replace(state, params=jax.jit(lambda params: jax.tree.map_with_path(changed, params))(state.params))


def batch_of(program: Program) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    numbers = {name: rng.integers(0, 64, spec.shape) for name, spec in program.batch.items()}
    numbers |= {name: np.ones(program.batch[name].shape) for name in {"segments", "positions"} & numbers.keys()}
    return {name: jax.device_put(numbers[name].astype(s.dtype), s.sharding) for name, s in program.batch.items()}


def computed(run: Run, *, steps: bool = False) -> dict[str, np.ndarray]:
    """Loss and gradients by path, and the bits of the frozen weights, which a step does not change."""
    program = program_of(run)
    state, batch = first_state(program), batch_of(program)
    with program.on_mesh, jax.default_matmul_precision("highest"):
        grads, sums, _ = jax.jit(program.gradients)(state.params, batch)
        before = {path: np.asarray(leaf) for path, leaf in leaves_by_name(state.params).items()}
        after = leaves_by_name(program.train_step(state, batch)[0].params) if steps else {}
    found = {path: np.asarray(leaf) for path, leaf in leaves_by_name(grads).items()}
    assert all("adapter" in path for path in found)
    for path, leaf in before.items() if steps else ():
        assert np.array_equal(leaf, np.asarray(after[path])) == (path not in found), path
    return found | {"loss": np.asarray(sums["loss"])} | {p: x for p, x in before.items() if p not in found}


@pytest.mark.parametrize(
    ("frozen", "experts", "dora", "meshes"),
    [("nf4", False, True, ("tensor", "context", "stage")), ("int8", True, False, ("expert", "canonical"))],
    ids=["dora-nf4", "experts-int8"],
)
@pytest.mark.slow(40)
def test_every_mesh_computes_the_same(frozen: str, meshes: tuple[str, ...], *, experts: bool, dora: bool) -> None:
    whole = computed(run_on("alone", frozen=frozen, experts=experts, dora=dora), steps=True)
    for name in meshes:
        found = computed(run_on(name, frozen=frozen, experts=experts, dora=dora))
        assert found.keys() == whole.keys()
        for path, leaf in found.items():
            if leaf.dtype in (np.int8, np.uint8) or path.endswith("scale"):
                np.testing.assert_array_equal(leaf, whole[path], err_msg=f"{name} {path}")
            else:
                assert relative_error(leaf, whole[path]) < 2e-5, (name, path)


def test_what_cannot_differ_within_a_batch_is_refused() -> None:
    run = run_on("alone", frozen=None, experts=False, dora=False)
    for changed, what in (
        (run_on("alone", frozen=None, experts=True, dora=False), "experts"),
        (run_on("alone", frozen=None, experts=False, dora=True), "magnitudes"),
        (replace(run, model=replace(run.model, layers=(replace(run.model.layers[0], mixer=LATENT),))), "latent"),
    ):
        program = program_of(changed)

        def decode(params: Any, program: Program = program) -> Any:
            with using_columns(jnp.ones((1, 4), bool)):
                return program.model(params).decode(jnp.ones((1, 1), int), program.module.empty_cache(1, 8))

        with program.on_mesh, pytest.raises(ConfigError, match=f"--adapter: .*{what}.*one adapter at a time"):
            jax.eval_shape(decode, program.params)


def test_an_adapter_adds_its_product_to_the_weight() -> None:
    """The loss is that of the model whose weights have it in them."""
    program = program_of(run_on("alone", frozen=None, experts=True, dora=False))
    state, batch, scale = first_state(program), batch_of(program), 32.0 / 4
    merged = leaves_by_name(state.params)
    for path in [path for path in merged if path.endswith(".a")]:
        parent, adapter, *name, _ = path.rsplit(".", 3 if ".adapters." in path else 2)
        weight = f"{parent}.{name[0]}" if name else f"{parent}.weight"
        a, b = merged[path], merged[path[:-1] + "b"]
        kept = 2 if name else 1  # layers, and experts
        whole = jax.vmap(lambda a, b: jnp.tensordot(a, b, 1)) if kept == 1 else jax.vmap(jax.vmap(jnp.matmul))
        with program.on_mesh:
            merged[weight] += scale * whole(a, b)
    base = program.base
    params = nested({path: leaf for path, leaf in merged.items() if "adapter" not in path})
    with program.on_mesh, jax.default_matmul_precision("highest"):
        found, expected = program.eval_step(state.params, batch), base.eval_step(params, batch)
    assert float(found["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-6)
