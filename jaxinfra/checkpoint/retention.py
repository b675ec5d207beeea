"""Which checkpoints are kept. Imports no JAX."""

from collections.abc import Mapping

from jaxinfra.checkpoint.config import CheckpointConfig

type Metrics = Mapping[str, float]


def superseded(steps: Mapping[int, Metrics], config: CheckpointConfig) -> list[int]:
    """Returns the steps that need not be kept, ascending.

    Args:
        steps: the intact checkpoints, with the metrics of their evaluations. Damaged ones are not counted, so there
            are never fewer intact ones than asked for.
        config: what to keep.
    """
    ordered = sorted(steps)
    kept = {*ordered[-config.keep_last :]}
    if config.keep_every is not None:
        kept |= {step for step in ordered if step % config.keep_every == 0}
    if config.keep_best is not None:
        sign = 1 if config.best_is == "lowest" else -1
        ranked = [
            (sign * steps[step][config.best_metric], -step) for step in ordered if config.best_metric in steps[step]
        ]
        kept |= {-step for _, step in sorted(ranked)[: config.keep_best]}
    return [step for step in ordered if step not in kept]
