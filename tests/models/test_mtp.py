"""Multi-token prediction against the definition in the DeepSeek-V3 paper, in NumPy; on meshes; and what is refused."""

import functools
from dataclasses import dataclass, replace
from typing import Any, override

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra.config import apply, fingerprint
from jaxinfra.models.adapter import Lora
from jaxinfra.models.flops import flops_per_token, matmul_params
from jaxinfra.models.moe import MixtureOfExperts
from jaxinfra.models.transformer import Layer, MultiTokenPrediction, TransformerConfig
from jaxinfra.objectives.causal_lm import CausalLM
from jaxinfra.objectives.losses import cross_entropy, reduce_partial_sums
from jaxinfra.parallel.mesh import make_mesh
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.parallel.spec import leaves_by_name, nested
from jaxinfra.program import Program
from jaxinfra.run import Run
from tests import refusals
from tests.models import numpy_reference
from tests.models.harness import BASE, LATENT, ONE, build
from tests.models.numpy_experts import ExpertStats
from tests.models.test_gradients import batch_on_host, run_of

DEPTHS, WEIGHT = 2, 0.5
EXPERTS = MixtureOfExperts(dim=12, num_experts=4, top_k=2, bias_update_rate=0.1)
MTP = MultiTokenPrediction(layer=Layer(mixer=LATENT, mlp=EXPERTS), depths=DEPTHS)
MESHES = {"data": MeshConfig(replica=2, fsdp=2), "context": MeshConfig(expert=2, tensor=2, context=2, fsdp=1)}


def run_with_mtp(mesh: MeshConfig = ONE, **changes: Any) -> Run:
    run = run_of({"mtp": MTP, **changes}, mesh)
    return replace(run, objective=CausalLM(mtp_weight=WEIGHT))


@functools.cache
def program_of(mesh: MeshConfig) -> Program:
    return Program(run_with_mtp(mesh), make_mesh(mesh, jax.devices()[: int(np.prod(mesh.sizes))]))


@functools.cache
def gradients_of(mesh: MeshConfig) -> tuple[dict[str, Any], dict[str, float], dict[str, Any]]:
    """Returns the gradients of the mean loss, the means of the sums, and the statistics."""
    program = program_of(mesh)
    batch = {name: jax.device_put(a, program.batch[name].sharding) for name, a in batch_on_host().items()}
    values = build(config=program.run.model).values()
    params = jax.tree.map(lambda v, p: jax.device_put(v, p.sharding), values, program.params)
    with program.on_mesh:
        grads, sums, stats = jax.tree.map(np.asarray, program.gradients(params, batch))
    return grads, {name: float(value / sums["weight"]) for name, value in sums.items()}, stats


def losses_by_definition(values: dict[str, Any], config: Any) -> tuple[float, float]:
    """Returns the main loss, and the mean of the losses of all depths: equations 21 to 25, one document at a time."""
    batch, params, stats = batch_on_host(), numpy_reference.as_float64(values), ExpertStats()
    modules, head, main, later = params["mtp"], params["unembedding"], 0.0, 0.0
    for row in range(len(batch["inputs"])):
        tokens, targets, weights, positions, segments = (
            batch[name][row] for name in ("inputs", "targets", "weights", "positions", "segments")
        )
        hidden_TD = numpy_reference.decode_row(params, config, tokens, positions, segments, stats)
        main += (numpy_reference.entropies(hidden_TD @ head, targets, None) * weights).sum()
        for document in np.unique(segments):
            (own,) = np.nonzero(segments == document)
            h_TD = hidden_TD[own]
            for depth in range(1, min(DEPTHS, len(own) - 1) + 1):  # the last positions have no token so far ahead
                module, ahead = numpy_reference.at_layer(modules, depth - 1), own[depth:]
                embedded_TD = numpy_reference.norm_rows(
                    params["embedding"][tokens[ahead]], module["embedding_norm"], config
                )
                h_TD = numpy_reference.norm_rows(h_TD[: len(ahead)], module["hidden_norm"], config)
                h_TD = np.concatenate([embedded_TD, h_TD], axis=-1) @ module["join"]["weight"]
                layer, where = config.mtp.layer, positions[own][: len(ahead)]
                h_TD = numpy_reference.apply_layer(h_TD, module["block"], config, layer, where, None, stats)
                h_TD = numpy_reference.norm_rows(h_TD, module["norm"], config)
                entropy = numpy_reference.entropies(h_TD @ head, targets[ahead], None)
                later += (entropy * weights[ahead]).sum() / DEPTHS
    total = float(batch["weights"].sum())
    return main / total, later / total


def test_losses_and_gradients_are_those_of_the_paper() -> None:
    """The losses to 1e-6; along the gradient of each group of parameters the slope is its squared norm, to 1e-4."""
    config = run_with_mtp().model
    values = build(config=config).values()
    grads, sums, stats = gradients_of(ONE)
    main, later = losses_by_definition(values, config)
    assert (sums["loss"], sums["mtp_loss"]) == (pytest.approx(main, rel=1e-6), pytest.approx(later, rel=1e-6))
    assert stats["mtp.expert_load"].shape == (DEPTHS, EXPERTS.num_experts)
    exact = numpy_reference.as_float64(values)

    def loss(values: dict[str, Any]) -> float:
        main, later = losses_by_definition(values, config)
        return main + WEIGHT * later

    flat = leaves_by_name(grads)
    groups = {".".join(path.split(".")[: 3 if path.startswith("mtp") else 1]) for path in flat}
    assert {"embedding", "unembedding", "norm", "mtp.join.weight", "mtp.norm.scale"} <= groups
    for group in groups:
        own = {path: grad for path, grad in flat.items() if path.startswith(group)}

        def moved(sign: float, own: dict[str, Any] = own) -> dict[str, Any]:
            return nested({path: value + sign * own.get(path, 0.0) for path, value in leaves_by_name(exact).items()})

        norm = sum(float((grad.astype(np.float64) ** 2).sum()) for grad in own.values())
        step = 1e-5 / max(np.abs(grad).max() for grad in own.values())
        slope = (loss(moved(step)) - loss(moved(-step))) / (2 * step)
        assert abs(slope - norm) < 1e-4 * norm, group


@pytest.mark.slow(8)
@pytest.mark.parametrize("mesh", MESHES)
def test_gradients_do_not_depend_on_the_mesh(mesh: str) -> None:
    """To 2e-5 of the largest; over context shards a token may come from another shard."""
    grads, sums, stats = gradients_of(ONE)
    on_mesh, same, same_stats = gradients_of(MESHES[mesh])
    assert same == pytest.approx(sums, rel=1e-6)
    assert jax.tree.map(np.array_equal, stats, same_stats) == dict.fromkeys(stats, True)
    for (path, one), other in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(on_mesh), strict=True):
        assert np.abs(other - one).max() < 2e-5 * np.abs(one).max() + 1e-7, jax.tree_util.keystr(path)


def test_training_alone_computes_the_modules() -> None:
    program = program_of(ONE)
    plain = Program(replace(program.run, model=replace(program.run.model, mtp=None)), program.mesh)
    assert leaves_by_name(program.specs).keys() > leaves_by_name(plain.specs).keys()
    with program.on_mesh:
        _, metrics = jax.eval_shape(program._train_step, program.state, program.batch)
        sums = jax.eval_shape(program._eval_step, program.params, program.batch)
        evaluated = [each.eval_step.lower(each.params, each.batch).as_text() for each in (program, plain)]
    assert "mtp_loss" in metrics and "mtp_loss" not in sums
    assert evaluated[0].count("dot_general") == evaluated[1].count("dot_general") > 0


def test_a_step_balances_the_experts_of_the_modules() -> None:
    values = build(config=run_with_mtp().model).values()
    stats = jax.tree.map(jnp.asarray, gradients_of(ONE)[2])
    found = program_of(ONE).model(values).update_buffers(stats)
    assert found.keys() == {"mtp"}
    steps = np.abs(found["mtp"]["block"]["mlp"]["bias"] - values["mtp"]["block"]["mlp"]["bias"])
    assert steps.shape == (DEPTHS, EXPERTS.num_experts) and steps.max() == pytest.approx(0.1)


def test_flops_count_the_modules_if_they_are_trained() -> None:
    """Each has its layer, the matrix that joins two inputs, and the head."""
    run = run_with_mtp()
    model, plain = run.model, replace(run.model, mtp=None)
    assert isinstance(model, TransformerConfig) and isinstance(plain, TransformerConfig)
    layer, hidden = MTP.layer, model.hidden_size
    module = (
        layer.mixer.matmul_params(hidden) + layer.mlp.matmul_params(hidden) + hidden * (2 * hidden + model.vocab_size)
    )
    assert matmul_params(model) - matmul_params(plain) == DEPTHS * module
    mesh = make_mesh(ONE, jax.devices()[:1])
    frozen = replace(run, objective=CausalLM(mtp_weight=0.0))
    flops = [Program(each, mesh).flops_per_sample for each in (frozen, replace(run, model=plain), run)]
    assert flops[0] == flops[1] == 8 * flops_per_token(plain, 8)
    assert flops[2] == 8 * flops_per_token(model, 8)


@pytest.mark.parametrize(
    "changes", [{"objective": CausalLM(mtp_weight=0.0)}, {"adapter": Lora(rank=2), "init": "runs/base"}]
)
def test_modules_that_are_not_trained_stay_as_they_are(changes: dict[str, Any]) -> None:
    program = Program(replace(run_with_mtp(), **changes), make_mesh(ONE, jax.devices()[:1]))
    specs = {path: spec for path, spec in leaves_by_name(program.specs).items() if path.startswith("mtp.")}
    assert specs and not any("adapter" in path or spec.state == "trained" for path, spec in specs.items())
    with program.on_mesh:
        assert "mtp_loss" not in jax.eval_shape(program._gradients, program.params, program.batch).sums


def test_a_model_without_modules_keeps_its_fingerprint() -> None:
    run = replace(run_with_mtp(), model=BASE, objective=CausalLM())
    assert fingerprint(run) == fingerprint(replace(run, objective=CausalLM(mtp_weight=0.3)))
    assert fingerprint(run) != fingerprint(replace(run, model=replace(BASE, mtp=MTP)))
    assert apply(replace(run, model=replace(BASE, mtp=MTP)), ["model.mtp=none"]) == run


@dataclass(frozen=True, kw_only=True)
class Halved(CausalLM):
    """Leaves the modules out."""

    @override
    def loss(self, apply: Any, params: Any, batch: Any) -> Any:
        logits = apply(params, batch)
        return reduce_partial_sums(apply, *cross_entropy(logits, batch["targets"], batch["weights"] / 2))


def test_what_is_refused() -> None:
    run = run_with_mtp()
    staged = replace(run, mesh=MeshConfig(stage=2, fsdp=1), train=replace(run.train, accumulate=2))
    refusals.problem(staged, "model.mtp", "mesh.stage=2", "model.mtp=none")
    refusals.problem(
        replace(BASE, mtp=MTP, learned_positions=12, layers=BASE.layers), "mtp", "learned_positions", "mtp=none"
    )
    program = Program(replace(run, objective=Halved()), make_mesh(ONE, jax.devices()[:1]))
    with program.on_mesh, refusals.raises(refusals.ConfigError, "Halved.loss", "mtp_loss", "objective.mtp_weight=0"):
        program.train_step.lower(program.state, program.batch)
