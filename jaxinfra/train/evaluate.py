"""Evaluation on fixed held-out data, every token counted once."""

import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp

from jaxinfra.program import Program, TrainState


def evaluate(
    program: Program,
    state: TrainState,
    batches: Iterable[tuple[int, dict]],
    place: Callable[[dict], dict[str, jax.Array]],
    heldout_bytes: int,
) -> dict[str, float]:
    """The mean loss over all held-out tokens, and bits per byte of text.

    The averaged parameters are evaluated where a run keeps them. The sums of batches meet on the device: the
    host waits once, at the end.

    Args:
        program: the compiled side of the run.
        state: what to evaluate.
        batches: held-out batches with weights; every evaluation gets the same.
        place: puts a host batch on the devices.
        heldout_bytes: bytes of text behind the tokens of weight one.

    Returns:
        `eval/loss` in nats a token and `eval/bits_per_byte`.
    """
    params = state.params if state.ema is None else state.ema
    total = None
    for _, batch in batches:
        sums = program.eval_step(params, place(batch))
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    assert total is not None, "the held-out split has at least one window"
    found = {name: float(value) for name, value in jax.device_get(total).items()}
    return {
        "eval/loss": found["loss"] / found["weight"],
        "eval/bits_per_byte": found["loss"] / math.log(2) / heldout_bytes,
    }
