"""Evaluation on fixed validation data, every sample counted once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxinfra.data.batches import BatchLoader
from jaxinfra.data.interfaces import Batch
from jaxinfra.program import Program, TrainState


def evaluate(
    program: Program, state: TrainState, batches: BatchLoader, place: Callable[[Batch], dict[str, jax.Array]]
) -> dict[str, float]:
    """The scores of the task over all validation samples, in batches that `place` puts on the devices, as "eval/NAME".

    The averaged parameters are evaluated where a run keeps them. The sums of batches meet on the device: the
    host waits once, at the end.
    """
    params = state.params if state.ema is None else state.ema
    total = None
    for _, batch in batches:
        sums = program.eval_step(params, place(batch))
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    assert total is not None, "there is at least one validation sample"
    found = {name: float(value) for name, value in jax.device_get(total).items() if not value.ndim}
    return {f"eval/{name}": score for name, score in program.task.scores(found, batches.samples).items()}
