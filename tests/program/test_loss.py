"""Calls `apply` as an objective does."""

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp

from jaxinfra.objectives.causal_lm import CausalLM
from jaxinfra.ops.logits import FactoredLogits
from jaxinfra.program.loss import Forward


def test_a_model_of_ones_own_need_not_know_how_its_loss_loops() -> None:
    logits = FactoredLogits(hidden=jnp.ones((1, 2, 3)), head=jnp.ones((3, 4)))
    model = SimpleNamespace(forward=lambda batch: (logits, {}))
    run = SimpleNamespace(model=object(), objective=CausalLM())
    for unroll_loops in (True, False):
        loss: Any = SimpleNamespace(unroll_loops=unroll_loops, run=run, model=lambda params: model)
        apply = Forward(loss, train=True)
        assert apply.unroll_loops == apply({}, {}).unroll_loops == unroll_loops
