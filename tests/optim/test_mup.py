"""Maximal update parametrization: what it changes of each kind of parameter, and nothing at the base width."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from jaxinfra.config import fingerprint
from jaxinfra.config.view import config_leaves
from jaxinfra.data.tokens import TokenData
from jaxinfra.models.flax_model import FlaxModel
from jaxinfra.models.moe import MixtureOfExperts
from jaxinfra.optim.config import OptimConfig, Optimizer
from jaxinfra.optim.optimizers import SGD, Adafactor, AdamW, Muon
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.parallel.spec import ParamSpec, leaves_by_name, normal
from jaxinfra.parity.meshes import make_program
from jaxinfra.run import Precision, Run, TrainConfig
from tests import refusals
from tests.decoders import decoder

MODEL = decoder(vocab_size=64, num_layers=1, hidden_size=64)
RUN = Run(
    name="mup",
    model=MODEL,
    data=TokenData(store="none", seq_len=8),
    precision=Precision(compute="float32"),
    mesh=MeshConfig(fsdp=1),
    train=TrainConfig(global_batch=4),
)


def in_mup(base_width: int, run: Run = RUN, **optim: Any) -> Run:
    return replace(run, optim=replace(run.optim, parametrization="mup", base_width=base_width, **optim))


def first_values(run: Run) -> dict[str, np.ndarray]:
    program = make_program(run)
    with program.on_mesh:
        return {name: np.asarray(a) for name, a in leaves_by_name(program.init(jax.random.key(0)).params).items()}


def growth(run: Run, standard: Run) -> dict[str, float]:
    """How much larger the initial values are in one run than in another, by parameter, except constants."""
    ours, theirs = first_values(run), first_values(standard)
    return {name: float(ours[name].std() / theirs[name].std()) for name in ours if theirs[name].std() > 1e-6}


def test_nothing_changes_at_the_base_width() -> None:
    def updated(run: Run) -> list[jax.Array]:
        program = make_program(run)
        with program.on_mesh:
            state = program.init(jax.random.key(0))
            updates, _ = program.optimizer.update(state.params, state.opt_state, state.params)
        return jax.tree.leaves((state.params, updates))

    ours = in_mup(64)
    assert ours.model.in_mup(ours.width_ratio) == RUN.model
    for our, their in zip(updated(ours), updated(RUN), strict=True):
        np.testing.assert_array_equal(our, their)


def test_initial_values_by_kind() -> None:
    experts = replace(MODEL.layers[0], mlp=MixtureOfExperts(dim=32, num_experts=4, top_k=2))
    run = replace(RUN, model=replace(MODEL, layers=(experts,)))
    found = growth(replace(in_mup(16, run), mesh=MeshConfig(fsdp=2, tensor=2)), run)  # of the same numbers on any mesh
    assert found.pop("blocks.mlp.router") == pytest.approx(0.5)
    assert found.pop("embedding") == pytest.approx(2)  # as wide a distribution as at the base width
    assert found.pop("unembedding") == pytest.approx(0.5)  # variance 1 / fan-in^2
    assert found and all(ratio == pytest.approx(1) for ratio in found.values())


HIDDEN, OUTPUT, INPUT = (4.0, 4.0), (4.0, 1.0), (1.0, 4.0)


@pytest.mark.parametrize(
    ("optimizer", "fans", "factor"),
    [
        (AdamW(), HIDDEN, 1 / 4),
        (AdamW(), OUTPUT, 1 / 4),
        (AdamW(), INPUT, 1),
        (Adafactor(), HIDDEN, 1 / 2),  # relative to parameters, which are half as large
        (Adafactor(), OUTPUT, 1),  # which are a quarter as large
        (Muon(scale="width"), HIDDEN, 1),
        (Muon(scale="rms"), HIDDEN, 1 / 2),
        (Muon(scale="width"), OUTPUT, 1 / 2),
    ],
)
def test_factors_of_updates(optimizer: Optimizer, fans: tuple[float, float], factor: float) -> None:
    spec = ParamSpec(
        shape=(8, 8), axes=(None, None), init=normal(1), role="matrix", in_dims=(0,), out_dims=(1,), fan_in=fans[0]
    )
    assert optimizer.width_factor(replace(spec, fan_out=fans[1])) == pytest.approx(factor)


def test_attention_and_tied_logits_have_factors() -> None:
    tied = replace(MODEL, tie_embeddings=True).in_mup(4.0)
    attention = tied.layers[0].mixer.attention(64)
    assert attention is not None and attention[0].scale == pytest.approx(16**-0.5 / 2)  # 1 / head_dim from 4 to 16
    assert tied.logits_scaling == 4.0
    wider = decoder(vocab_size=64, num_layers=1, hidden_size=64, head_dim=16).with_width(128)
    assert wider == decoder(
        vocab_size=64, num_layers=1, hidden_size=128, head_dim=16, num_heads=8, num_kv_heads=8, mlp_dim=128
    )


@dataclass(frozen=True, kw_only=True)
class Net(FlaxModel):
    """Embeds tokens, and maps them to logits through a hidden layer."""

    hidden_size: int = 64

    def make_module(self, rngs: nnx.Rngs) -> nnx.Module:
        embed, hidden = (
            nnx.Embed(64, self.hidden_size, rngs=rngs),
            nnx.Linear(self.hidden_size, self.hidden_size, rngs=rngs),
        )
        return nnx.Sequential(embed, hidden, nnx.relu, nnx.Linear(self.hidden_size, 64, rngs=rngs))


def test_modules_of_flax_are_measured() -> None:
    run = replace(RUN, model=Net())
    found = growth(in_mup(16, run), run)
    kernels = [
        found[f"module.layers.{index}.{name}"] for index, name in ((0, "embedding"), (1, "kernel"), (3, "kernel"))
    ]
    assert kernels == [pytest.approx(2), pytest.approx(1), pytest.approx(0.5)]


@dataclass(frozen=True, kw_only=True)
class Other(Net):
    """Has a layer more at another width, or a kernel with more dimensions."""

    head: str = "linear"

    def with_width(self, width: int) -> "Other":
        return replace(self, hidden_size=width, head="deeper" if self.head == "linear" else "convolution")

    def make_module(self, rngs: nnx.Rngs) -> nnx.Module:
        *layers, linear = super().make_module(rngs).layers
        if self.head == "convolution":
            return nnx.Sequential(*layers, nnx.Conv(self.hidden_size, 64, (1,), rngs=rngs))
        return nnx.Sequential(*layers, linear, *([nnx.LayerNorm(64, rngs=rngs)] if self.head == "deeper" else []))


def test_what_mup_cannot_do_is_refused() -> None:
    refusals.problem(replace(RUN, optim=OptimConfig(parametrization="mup")), "optim.parametrization base_width")
    refusals.problem(in_mup(16, replace(RUN, init="hf:ORG/NAME")), "init published")
    with refusals.raises(refusals.ConfigError, "optim.parametrization=mup optim.optimizer=adamw"):
        make_program(in_mup(16, optimizer=SGD()))
    for head, name in (("linear", "module.layers.4"), ("deeper", "module.layers.3.kernel")):
        with refusals.raises(refusals.ConfigError, f"optim.base_width {name} with_width"):
            make_program(in_mup(16, replace(RUN, model=Other(head=head))))


def test_the_fingerprint_of_a_run_without_it_is_that_from_before() -> None:
    assert fingerprint(in_mup(16)) != fingerprint(RUN)
    assert fingerprint(replace(RUN, optim=replace(RUN.optim, base_width=16))) != fingerprint(RUN)
    assert "optim.parametrization" in config_leaves(RUN, fingerprinted_only=True)  # shown, but not hashed
