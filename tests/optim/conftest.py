"""One small set of parameters with every role, two stacks of layers and split heads."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import pytest

from jaxinfra.optim.matrix_dims import is_param_spec
from jaxinfra.parallel.spec import ParamSpec, normal

SPECS = {
    "embedding": ParamSpec(shape=(16, 8), axes=("vocab", "embed"), init=normal(1.0), role="embedding"),
    "blocks": {
        "q": ParamSpec(
            shape=(3, 8, 4, 4),
            axes=("layers", "embed", "heads", "head_dim"),
            init=normal(1.0),
            role="matrix",
            in_dims=(1,),
            out_dims=(2, 3),
        ),
        "o": ParamSpec(
            shape=(3, 4, 4, 8),
            axes=("layers", "heads", "head_dim", "embed"),
            init=normal(1.0),
            role="matrix",
            in_dims=(1, 2),
            out_dims=(3,),
        ),
        "scale": ParamSpec(shape=(3, 8), axes=("layers", "embed"), init=normal(1.0), role="norm"),
        "bias": ParamSpec(shape=(3, 16), axes=("layers", "mlp"), init=normal(1.0), role="bias"),
    },
    "prefix": {
        "up": ParamSpec(
            shape=(2, 8, 16),
            axes=("layers", "embed", "mlp"),
            init=normal(1.0),
            role="matrix",
            in_dims=(1,),
            out_dims=(2,),
        )
    },
    "head": ParamSpec(
        shape=(8, 16), axes=("embed", "vocab"), init=normal(1.0), role="head", in_dims=(0,), out_dims=(1,)
    ),
}


@pytest.fixture
def specs() -> dict[str, Any]:
    """The `ParamSpec`s."""
    return SPECS


@pytest.fixture
def draw() -> Callable[[int], Any]:
    """`draw(seed)`: a NumPy tree of normal values, shaped like the parameters."""

    def values(seed: int) -> Any:
        rng = np.random.default_rng(seed)
        return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), SPECS, is_leaf=is_param_spec)

    return values


@pytest.fixture
def train(draw: Callable[[int], Any]) -> Callable[[optax.GradientTransformation, int], tuple[Any, Any]]:
    """`train(tx, updates)`: parameters and state after updates with draw(1), draw(2), ..."""

    def run(tx: optax.GradientTransformation, updates: int) -> tuple[Any, Any]:
        params = jax.tree.map(jax.numpy.asarray, draw(0))
        state = tx.init(params)
        update = jax.jit(tx.update)
        for seed in range(1, updates + 1):
            deltas, state = update(draw(seed), state, params)
            params = optax.apply_updates(params, deltas)
        return params, state

    return run
