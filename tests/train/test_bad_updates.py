"""States that no longer hold numbers are not saved, and optimizers whose updates are of the wrong kind are refused."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxinfra.errors import ConfigError, NonFiniteError
from jaxinfra.optim.config import LRSchedule, Optimizer
from jaxinfra.train.trainer import Trainer
from tests.tiny_run import Tiny


@dataclass(frozen=True, kw_only=True)
class NanAt(LRSchedule):
    """A schedule whose rate is no number at one step."""

    step: int = 11

    def multiplier(self, step: Any, steps: int, xp: Any) -> Any:
        return xp.where(step == self.step, xp.nan, 1.0)


@dataclass(frozen=True, kw_only=True)
class NanUpdate(Optimizer):
    """Updates that are not numbers in the last step: its loss and gradient are."""

    def transform(self, specs: Any) -> optax.GradientTransformation:
        def update(grads: Any, count: jax.Array, params: Any) -> tuple[Any, jax.Array]:
            scale = jnp.where(count == 11, jnp.nan, 0.0)
            return jax.tree.map(lambda g: g * 0 + scale, grads), count + 1

        return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)


@pytest.mark.parametrize(
    "optim", [{"schedule": NanAt()}, {"optimizer": NanUpdate()}], ids=["rate of the last step", "last update"]
)
def test_a_state_that_is_not_finite_is_not_saved(tiny: Tiny, optim: dict[str, Any]) -> None:
    run = tiny.loaded("train.eval_every=none", "track.console=off")
    trainer = Trainer(replace(run, optim=replace(run.optim, **optim)))
    with pytest.raises(NonFiniteError, match="step 12"):
        trainer.train()
    assert sorted(int(path.name) for path in trainer.run_dir.checkpoints.iterdir()) == [5, 10]


def _optimizer(update: Callable[[Any, Any], tuple[Any, Any]]) -> Optimizer:
    def transform(self: Optimizer, specs: Any) -> optax.GradientTransformation:
        return optax.GradientTransformation(lambda params: jnp.zeros(3), lambda g, s, p=None: update(g, s))

    cls = type("Wrong", (Optimizer,), {"transform": transform, "__module__": __name__})
    return dataclass(frozen=True, kw_only=True)(cls)()


@pytest.mark.parametrize(
    ("update", "words"),
    [
        (lambda grads, state: ({"other": jnp.zeros(3)}, state), "Wrong another tree"),
        (lambda grads, state: (grads, jnp.zeros(4)), "Wrong state init"),
        (lambda grads, state: (grads, ()), "Wrong state init"),
    ],
    ids=["updates of another tree", "state of another shape", "state of another tree"],
)
def test_an_update_of_the_wrong_kind_is_refused(tiny: Tiny, update: Any, words: str) -> None:
    run = tiny.loaded("track.console=off")
    trainer = Trainer(replace(run, optim=replace(run.optim, optimizer=_optimizer(update))))
    with pytest.raises(ConfigError) as refused:
        trainer.program.lower()
    assert all(word in str(refused.value) for word in words.split()), refused.value
