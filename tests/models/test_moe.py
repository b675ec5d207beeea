"""A mixture of experts against the NumPy reference: choices, capacity, losses, biases; and invalid configs."""

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra.families.zoo import shape
from jaxinfra.models.attention import Attention
from jaxinfra.models.flops import matmul_params
from jaxinfra.models.layers import MLP
from jaxinfra.models.moe import BALANCE_LOSS, LOAD, SERVED, Z_LOSS, MixtureOfExperts, metrics, updated_bias
from jaxinfra.models.transformer import Layer
from jaxinfra.ops import routing
from jaxinfra.parallel.context import SequenceSharding
from tests.decoders import decoder
from tests.models import numpy_reference
from tests.models.harness import BuiltDecoder, build, random_tokens, relative_error
from tests.models.numpy_experts import ExpertStats
from tests.refusals import problem

PLAIN = MixtureOfExperts(dim=12, num_experts=8, top_k=2)
LOSSES = {"balance_loss": 0.3, "z_loss": 0.02}
VARIANTS: dict[str, MixtureOfExperts] = {
    "mixtral": PLAIN,
    "one choice": replace(PLAIN, top_k=1),
    "every expert": replace(PLAIN, top_k=8),
    "not normalized": replace(PLAIN, normalize_weights=False),
    "sigmoid": replace(PLAIN, score_function="sigmoid", routed_scaling_factor=2.5),
    "sigmoid, not normalized": replace(PLAIN, score_function="sigmoid", normalize_weights=False),
    "biases": replace(PLAIN, bias_update_rate=0.1),
    "groups": replace(PLAIN, top_k=3, num_groups=4, top_k_groups=2),
    "shared": replace(PLAIN, num_shared_experts=2),
    "gelu": replace(PLAIN, activation="gelu"),
    "gated shared": replace(PLAIN, num_shared_experts=1, shared_gate=True),
    "router and expert biases": replace(PLAIN, router_bias=True, bias=True),
    "clamped": replace(PLAIN, activation="clamped_swiglu", bias=True),
    "capacity": replace(PLAIN, capacity_factor=0.7),
    "scaled inputs": replace(PLAIN, score_function="sigmoid", normalize_weights=False, scale_inputs=True),
    "llama 4": MixtureOfExperts(
        dim=12,
        num_experts=8,
        top_k=1,
        num_shared_experts=1,
        score_function="sigmoid",
        normalize_weights=False,
        scale_inputs=True,
        capacity_factor=1.1,
    ),
    "deepseek": MixtureOfExperts(
        dim=12,
        num_experts=8,
        top_k=3,
        score_function="sigmoid",
        routed_scaling_factor=2.5,
        num_shared_experts=1,
        num_groups=4,
        top_k_groups=2,
        bias_update_rate=0.1,
        capacity_factor=1.1,
    ),
}


def logits_and_stats(
    built: BuiltDecoder, values: dict[str, Any], tokens: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:

    def run(params: Any, tokens: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        model, batch = built.model(params), {"inputs": tokens}
        logits, stats = model.forward(batch)
        return logits.materialize(), stats

    with jax.set_mesh(built.mesh):
        return jax.tree.map(np.asarray, jax.jit(run)(built.put(values), built.put_rows(tokens)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_stats_agree_with_the_definition(variant: str) -> None:
    built = build(mlp=replace(VARIANTS[variant], **LOSSES), num_layers=2)
    values, tokens, stats = built.values(), random_tokens(), ExpertStats()
    expected = numpy_reference.logits(values, built.config, tokens, stats=stats)
    logits, actual = logits_and_stats(built, values, tokens)
    assert relative_error(logits, expected) < 2e-5
    load_BLE = np.array(stats.load).reshape(len(tokens), 2, -1)
    assert np.array_equal(actual[LOAD], load_BLE.sum(axis=0))
    assert actual[SERVED].sum() == stats.served
    assert relative_error(actual[BALANCE_LOSS].sum(), stats.balance_loss) < 1e-5
    assert relative_error(actual[Z_LOSS].sum(), stats.z_loss) < 1e-5


def test_biases_are_updated_in_every_layer_also_of_a_last_period_that_is_cut_short() -> None:
    biased = Layer(mixer=Attention(num_heads=4), mlp=replace(PLAIN, bias_update_rate=0.1))
    built = build(layers=(biased, replace(biased, mlp=MLP(dim=12))), num_layers=3)
    values = built.values()
    _, stats = logits_and_stats(built, values, random_tokens())
    found = built.model(values).update_buffers(jax.tree.map(jnp.asarray, stats))
    assert {*found} == {"blocks", "tail"}
    for new, old in ((found["blocks"]["layer_0"], values["blocks"]["layer_0"]), (found["tail"], values["tail"])):
        steps = np.abs(new["mlp"]["bias"] - old["mlp"]["bias"])
        assert steps.shape == (1, 8) and steps.max() == pytest.approx(0.1)


def test_an_even_load_has_a_balance_loss_of_one_a_token() -> None:
    experts_BTK = jnp.arange(16).reshape(1, 8, 2) % 4
    scores_BTE = jnp.full((1, 8, 4), 1 / 4)
    actual = routing.load_balance_loss(routing.expert_mask(experts_BTK, 4), scores_BTE, 2, SequenceSharding())
    assert float(actual) == pytest.approx(8)


def test_experts_serve_the_first_tokens_whatever_comes_later() -> None:
    experts_BTK = jnp.array([[[0, 1], [0, 2], [1, 0], [0, 1]]])

    def served(experts: jax.Array) -> list[list[bool]]:
        return routing.within_capacity(experts, routing.expert_mask(experts, 3), 2, SequenceSharding())[0].tolist()

    assert served(experts_BTK) == [[True, True], [True, True], [True, False], [False, False]]
    assert served(experts_BTK.at[0, 3].set(jnp.array([2, 0])))[:3] == served(experts_BTK)[:3]


def test_capacity_is_a_multiple_of_the_even_share() -> None:
    assert replace(PLAIN, capacity_factor=1.25).capacity(100) == math.ceil(1.25 * 100 * 2 / 8)
    assert replace(PLAIN, capacity_factor=9.0).capacity(100) == 100
    assert PLAIN.capacity(100) is None


def test_equal_scores_choose_the_first_experts() -> None:
    actual = routing.choose_experts(jnp.zeros((1, 8)), PLAIN.routing_rule(4, drop_tokens=True))
    assert actual.experts.tolist() == [[0, 1]]
    assert actual.weights.tolist() == [[0.5, 0.5]]


def test_biases_affect_choices_but_not_weights() -> None:
    rule = replace(PLAIN, score_function="sigmoid", normalize_weights=False).routing_rule(4, drop_tokens=True)
    logits = jnp.array([[0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]])
    actual = routing.choose_experts(logits, rule, jnp.array([9.0, 8.0, 0, 0, 0, 0, 0, 0]))
    assert actual.experts.tolist() == [[0, 1]]
    np.testing.assert_allclose(actual.weights, jax.nn.sigmoid(logits[:, :2]))


def test_biases_rise_where_the_load_is_below_the_mean() -> None:
    load = jnp.array([[4.0, 2.0, 0.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    actual = updated_bias(jnp.zeros((2, 4)), load, 0.5)
    assert actual.tolist() == [[-0.5, 0.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]]


def test_metrics() -> None:
    stats = {LOAD: jnp.array([[4.0, 2.0, 0.0, 2.0], [2.0, 2.0, 2.0, 2.0]]), SERVED: jnp.array([6.0, 8.0])}
    actual = metrics({**stats, BALANCE_LOSS: jnp.array([1.0, 3.0]), Z_LOSS: jnp.array([0.0, 0.5])}, jnp.array(8.0))
    assert {name: float(value) for name, value in actual.items()} == {
        "balance_loss": 0.5,
        "router_z_loss": 0.0625,
        "expert_load_max": 2.0,
        "expert_dropped": 0.125,
        "expert_load/0": 1.5,
        "expert_load/1": 1.0,
        "expert_load/2": 0.5,
        "expert_load/3": 1.0,
    }
    assert metrics({}, jnp.array(8.0)) == {}


def test_flops_count_the_experts_of_a_token() -> None:
    """Width 8, two heads of 4, experts of 6 of which two are chosen and one is shared, ten tokens, three layers."""
    experts = MixtureOfExperts(dim=6, num_experts=5, top_k=2, num_shared_experts=1)
    config = decoder(vocab_size=10, num_layers=3, hidden_size=8, mixer=Attention(num_heads=2), mlp=experts)
    attention, router, expert = 4 * 8 * 8, 8 * 5, 3 * 8 * 6
    assert matmul_params(config) == 3 * (attention + router + 3 * expert) + 8 * 10
    # Active parameters without the embedding: 12.9B and 3.3B are published.
    assert matmul_params(shape("mixtral-8x7b")) / 1e9 == pytest.approx(12.9 - 0.13, abs=0.05)
    assert matmul_params(shape("qwen3-30b-a3b")) / 1e9 == pytest.approx(3.35 - 0.31, abs=0.05)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_experts": 0}, "num_experts=0: use num_experts=8"),
        ({"top_k": 9}, "top_k=9, num_experts=8: use top_k=8"),
        ({"num_groups": 2, "top_k_groups": 3}, "top_k_groups=3, num_groups=2: use top_k_groups=2"),
        ({"num_groups": 3}, "num_groups=3, num_experts=8: use num_groups=2"),
        ({"num_groups": 8}, "num_groups=8, num_experts=8: use num_groups=4"),
        ({"top_k": 3, "num_groups": 4}, "top_k=3, top_k_groups=1: use top_k_groups=2"),
        ({"capacity_factor": 0.0}, "capacity_factor=0.0: use capacity_factor=none"),
        ({"bias_update_rate": -0.1}, "bias_update_rate=-0.1: use bias_update_rate=0"),
    ],
)
def test_invalid_configs(changes: dict[str, Any], named: str) -> None:
    problem(replace(PLAIN, **changes), named)
