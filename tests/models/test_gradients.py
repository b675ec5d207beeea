"""Gradients against finite differences of the NumPy reference, on meshes, and under every remat policy."""

import functools
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
import pytest

from jaxinfra.config import load, validate
from jaxinfra.data.tokens import TokenData
from jaxinfra.errors import ConfigError
from jaxinfra.models.remat import Named, Remat, TensorName
from jaxinfra.models.transformer import TransformerConfig
from jaxinfra.objectives.causal_lm import CausalLM
from jaxinfra.optim.config import OptimConfig
from jaxinfra.parallel.mesh import abstract_mesh, make_mesh
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.program import Program
from jaxinfra.run import Precision, Run, TrainConfig
from tests.decoders import changed
from tests.golden.proven import Unless
from tests.models import numpy_reference
from tests.models.harness import BASE, MODELS, ONE, build, random_tokens, relative_error, slow_but
from tests.models.numpy_experts import ExpertStats
from tests.refusals import raises

CUBE = MeshConfig(replica=2, fsdp=2, tensor=2)
ROWS, LENGTH = 4, 8
type Policy = Remat | tuple[Remat, ...]
CONFIG = Path(__file__).parents[2] / "configs" / "gpt2_124m.py"
NAMES: tuple[TensorName, ...] = get_args(TensorName.__value__)


def run_of(changes: dict[str, Any], mesh: MeshConfig, accumulate: int = 1) -> Run:
    return Run(
        name="test",
        model=changed(BASE, **{"num_layers": 2} | changes),
        objective=CausalLM(loss_chunks=2),
        data=TokenData(store="none", seq_len=LENGTH),
        precision=Precision(compute="float32"),
        mesh=mesh,
        optim=OptimConfig(),
        train=TrainConfig(global_batch=ROWS, accumulate=accumulate),
    )


def batch_on_host() -> dict[str, np.ndarray]:
    """Two documents a row, and weights of zero and one."""
    first = np.arange(LENGTH) < np.array([[2], [8], [5], [1]])
    return {
        "inputs": random_tokens(ROWS, LENGTH),
        "targets": random_tokens(ROWS, LENGTH, seed=1),
        "segments": np.where(first, 0, 1).astype(np.int32),
        "positions": np.where(first, np.arange(LENGTH), np.arange(LENGTH) - first.sum(1, keepdims=True)).astype(
            np.int32
        ),
        "weights": (np.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) % 5 > 0).astype(np.float32),
    }


def program_of(model: str, mesh: MeshConfig, policy: Policy = "none") -> Program:
    run = run_of(MODELS[model] | {"remat": policy}, mesh)
    return Program(run, make_mesh(run.mesh, jax.devices()[: int(np.prod(run.mesh.sizes))]))


@functools.cache
def gradients_of(model: str, mesh: MeshConfig, policy: Policy = "none") -> tuple[dict[str, Any], float]:
    """Returns the gradients of the mean loss, and that loss."""
    program = program_of(model, mesh, policy)
    values = values_of(program.run)
    batch = {name: jax.device_put(a, program.batch[name].sharding) for name, a in batch_on_host().items()}
    params = jax.tree.map(lambda v, p: jax.device_put(v, p.sharding), values, program.params)
    with program.on_mesh:
        grads, sums, _ = program.gradients(params, batch)
    return jax.tree.map(np.asarray, grads), float(sums["loss"] / sums["weight"])


def loss_by_definition(values: dict[str, Any], config: Any) -> tuple[float, float]:
    """Returns the mean cross-entropy, and the mean auxiliary loss."""
    batch, stats = batch_on_host(), ExpertStats()
    logits = numpy_reference.logits(values, config, batch["inputs"], batch["positions"], batch["segments"], stats)
    entropy = numpy_reference.entropies(logits, batch["targets"], config.logit_softcap)
    weight = float(batch["weights"].sum())
    return float((entropy * batch["weights"]).sum()) / weight, (stats.balance_loss + stats.z_loss) / weight


def finite_differences(values: dict[str, Any], directions: dict[str, Any], config: Any) -> list[float]:
    """Returns central differences of the loss along the direction of each parameter alone."""
    exact, slopes = numpy_reference.as_float64(values), []
    for path, direction in jax.tree.leaves_with_path(directions):
        step = 1e-5 / np.abs(direction).max()

        def moved(sign: int, path=path, change=step * direction) -> dict[str, Any]:
            return jax.tree.map_with_path(lambda at, value: value + sign * change if at == path else value, exact)

        ahead, behind = (sum(loss_by_definition(moved(sign), config)) for sign in (1, -1))
        slopes.append((ahead - behind) / (2 * step))
    return slopes


def values_of(run: Run) -> dict[str, Any]:
    return build(config=run.model).values()


@pytest.mark.parametrize("model", slow_but("llama", "gpt-2", "gemma"))
def test_gradients_agree_with_finite_differences(model: str, unless_proven: Unless) -> None:
    """Along the gradient of every parameter the slope is its squared norm, to 1e-4."""
    unless_proven(lambda: assert_slopes(model), program_of(model, ONE))


def assert_slopes(model: str) -> None:
    run = run_of(MODELS[model], ONE)
    values, config = values_of(run), run.model
    grads, loss = gradients_of(model, ONE)
    assert relative_error(loss, loss_by_definition(values, config)[0]) < 1e-6

    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(grads)]
    norms = [float((g.astype(np.float64) ** 2).sum()) for g in jax.tree.leaves(grads)]
    slopes = finite_differences(values, grads, config)
    # A bias on keys adds the same to all scores of a query: without rotation it has no effect, and no slope.
    idle = [path for path, norm in zip(paths, norms, strict=True) if norm < 1e-9]
    assert idle == (["['blocks']['attention']['key']['bias']"] if model == "gpt-2" else [])
    for path, norm, slope in zip(paths, norms, slopes, strict=True):
        assert abs(slope - norm) < 1e-4 * norm + 1e-12, path


@pytest.mark.parametrize("model", slow_but("llama"))
def test_gradients_do_not_depend_on_the_mesh(model: str, unless_proven: Unless) -> None:
    """To 2e-5 of the largest."""
    unless_proven(lambda: assert_same_on_the_cube(model), program_of(model, ONE), program_of(model, CUBE))


def assert_same_on_the_cube(model: str) -> None:
    grads, loss = gradients_of(model, ONE)
    on_cube, same = gradients_of(model, CUBE)
    assert loss == pytest.approx(same, rel=1e-6)
    for (path, one), other in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(on_cube), strict=True):
        assert np.abs(other - one).max() < 2e-5 * np.abs(one).max() + 1e-7, jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    ("model", "policy"),
    [
        *(("llama", policy) for policy in ("weights", "dots", "dots_and_attention", "full", "offload")),
        ("llama", Named(save=("query", "mlp_up", "out_proj"), offload=("layer_input", "attention_out"))),
        *(
            pytest.param(model, policy, marks=pytest.mark.slow(6))
            for model in MODELS
            for policy in (Named(save=NAMES[::2], offload=NAMES[1::2]), Named(save=NAMES[1::2], offload=NAMES[::2]))
        ),
        pytest.param("gemma", (Named(save=("key",)), Named(offload=("value",))), marks=pytest.mark.slow(6)),
        pytest.param("gemma", ("full", "dots"), marks=pytest.mark.slow(6)),
        pytest.param("gemma", ("none", "offload", "weights"), marks=pytest.mark.slow(6)),
    ],
    ids=str,
)
def test_remat_keeps_loss_and_gradients(model: str, policy: Policy, unless_proven: Unless) -> None:
    """To 1e-6: the same numbers are computed, only fused otherwise."""
    programs = program_of(model, CUBE), program_of(model, CUBE, policy)
    unless_proven(lambda: assert_same_with_remat(model, policy), *programs)


def assert_same_with_remat(model: str, policy: Policy) -> None:
    plain, loss = gradients_of(model, CUBE)
    again, same = gradients_of(model, CUBE, policy)
    assert loss == pytest.approx(same, rel=1e-6)
    for (path, one), other in zip(jax.tree.leaves_with_path(plain), jax.tree.leaves(again), strict=True):
        assert relative_error(other, one) < 1e-6, jax.tree_util.keystr(path)


def lowered(policy: Policy, platform: str) -> str:
    return Program(run_of({"remat": policy}, CUBE), abstract_mesh(CUBE), platform).lower().as_text()


def test_remat_policies_recompute_matmuls() -> None:
    products = {policy: lowered(policy, "cpu").count("dot_general") for policy in ("none", "dots", "full")}
    in_attention, in_layer = 2, 2 + 7
    assert products["none"] < products["dots"] <= products["none"] + in_attention
    mixed = lowered(("full", "dots"), "cpu").count("dot_general")
    assert products["full"] < mixed < 2 * products["full"]
    assert products["dots"] + 5 <= products["full"] <= products["none"] + in_layer


@pytest.mark.parametrize("model", MODELS)
def test_every_family_names_its_tensors(model: str) -> None:
    """Those that it has: only an MLP without gating lacks one."""
    program = program_of(model, ONE, "full")
    with program.on_mesh:
        traced = str(jax.make_jaxpr(program.gradients)(program.params, program.batch))
    missing = {"mlp_gate"} if model == "gpt-2" else set()
    assert {name for name in NAMES if f"name={name}" in traced} == {*NAMES} - missing


@pytest.mark.parametrize("name", ["query", "key", "value", "out_proj", "mlp_gate", "mlp_up"])
def test_a_tensor_that_is_saved_is_not_made_again(name: TensorName) -> None:
    full, saved = (lowered(policy, "cpu").count("dot_general") for policy in ("full", Named(save=(name,))))
    assert saved == full - 1


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_that_is_offloaded_moves_to_host_memory(name: TensorName) -> None:
    """The last one of a layer is read by no gradient, so it moves nowhere."""
    assert ("pinned_host" in lowered(Named(offload=(name,)), "tpu")) == (name != "mlp_down")


def test_a_name_that_no_layer_has() -> None:
    with raises(ConfigError, "model.remat.save=key,querry did you mean key,query?"):
        load(CONFIG, ["model.remat=named", "model.remat.save=key,querry"], root=Run)
    model = load(CONFIG, ["model.remat=named", "model.remat.save=query,key"], root=Run).run.model
    assert isinstance(model, TransformerConfig) and model.remat == Named(save=("query", "key"))
    with raises(ConfigError, "model.remat.save model.remat.offload key is in both leave it out of one"):
        validate(run_of({"remat": Named(save=("key",), offload=("key",))}, ONE))


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_offload_moves_to_host_memory(platform: str) -> None:
    assert "pinned_host" in lowered("offload", platform)
    assert "pinned_host" not in lowered("dots", platform)
