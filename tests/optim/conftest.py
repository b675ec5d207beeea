"""One small set of parameters with every role, two stacks of layers and split heads."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import pytest

from jaxinfra.parallel.spec import ParamSpec, Role, normal


def spec(role: Role, shape: tuple[int, ...], *axes: str, **dims: tuple[int, ...]) -> ParamSpec:
    return ParamSpec(shape=shape, axes=axes, init=normal(1.0), role=role, **dims)


SPECS = {
    "embedding": spec("embedding", (16, 8), "vocab", "embed"),
    "blocks": {
        "q": spec("matrix", (3, 8, 4, 4), "layers", "embed", "heads", "head_dim", in_dims=(1,), out_dims=(2, 3)),
        "o": spec("matrix", (3, 4, 4, 8), "layers", "heads", "head_dim", "embed", in_dims=(1, 2), out_dims=(3,)),
        "scale": spec("norm", (3, 8), "layers", "embed"),
        "bias": spec("bias", (3, 16), "layers", "mlp"),
    },
    "prefix": {"up": spec("matrix", (2, 8, 16), "layers", "embed", "mlp", in_dims=(1,), out_dims=(2,))},
    "head": spec("head", (8, 16), "embed", "vocab", in_dims=(0,), out_dims=(1,)),
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
        return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), SPECS)

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
