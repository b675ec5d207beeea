"""Evaluates the parameters of a run on all validation samples, in a training and outside of one."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxinfra.failpoints import failpoint
from jaxinfra.parallel.spec import Params, merge_trees
from jaxinfra.program import TrainState
from jaxinfra.train.job import Job
from jaxinfra.train.phases import Phases
from jaxinfra.user_code import user_code_errors


def evaluated_params(state: TrainState) -> Params:
    """Returns the parameters to evaluate: the averaged ones (EMA) if the run keeps them."""
    # Of an adapter, only what is trained has an average.
    return state.params if state.ema is None else merge_trees(state.params, state.ema)


def evaluate(
    job: Job, state: TrainState, completed_steps: int, phases: Phases, *, stops: Callable[[], bool] = lambda: False
) -> dict[str, float] | None:
    """Returns the objective's metrics over all validation samples, each counted once, as "eval/NAME".

    Evaluates `evaluated_params`. Sums stay on the devices until the end, and the host runs at most two batches ahead
    of them. Returns None once `stops` returns True, which it must do in all processes after the same batch.
    """
    params, total, last = evaluated_params(state), None, None
    with job.program.on_mesh:
        for _, batch in job.data.validation:
            jax.block_until_ready(last)  # the sums up to the batch before the last one, which the devices compute now
            if stops():
                return None
            last = total
            with phases.first("eval_step"):
                sums = job.program.eval_step(params, job.data.place(batch), state.reference)
            if total is None:
                failpoint("evaluation", completed_steps)
            total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    assert total is not None, "there is at least one validation sample"
    sums = {name: float(value) for name, value in jax.device_get(total).items()}
    objective = job.program.objective
    with user_code_errors(type(objective), "objective"):
        # Process 0 tells the others: counting the bytes of the text reads all validation samples.
        metrics = objective.evaluation_metrics(sums, job.data.validation.samples) if job.is_main else {}
        metrics = {f"eval/{name}": float(value) for name, value in metrics.items()}
    return job.peers.broadcast(metrics)
