"""From the first values, three steps of AdamW, clipped and averaged, end in the same state on every mesh."""

import functools

import jax
import numpy as np
import pytest

from jaxinfra.parallel.mesh import MeshConfig
from tests.parity.cases import DOCUMENTS, Case, batch_on_host, on_host, put, too_different


def trained(case: Case) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], list[dict[str, float]]]:
    """The state before the first step and after the last, and the metrics of each step."""
    program, metrics = case.program(), []
    with program.on_mesh:
        state = program.init(jax.random.key(0))
        start = on_host(state)
        for step in range(case.run.train.steps):
            state, found = program.train_step(state, put(batch_on_host(case.run, seed=step), program.batch))
            metrics.append({name: float(value) for name, value in found.items()})
    return start, _roots(on_host(state)), metrics


def _roots(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The roots of second moments in their place: a square has twice the relative error of the gradient."""
    return {path: np.sqrt(value) if ".nu" in path else value for path, value in state.items()}


@functools.cache
def on_one_device() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], list[dict[str, float]]]:
    return trained(Case(run=DOCUMENTS))


def test_the_steps_move_every_parameter_and_clip() -> None:
    """Else their agreement would say nothing."""
    start, end, metrics = on_one_device()
    still = {
        path
        for path, before in start.items()
        if path.startswith(("params.", "ema.")) and np.abs(end[path] - before).max() < 0.005 * np.abs(before).max()
    }
    assert still == set()
    assert all(row["grad_norm"] > (DOCUMENTS.optim.clip_norm or np.inf) for row in metrics)


@pytest.mark.parametrize(
    "case",
    [
        Case(run=DOCUMENTS, mesh=MeshConfig(replica=2, fsdp=2, tensor=2), accumulate=2),
        Case(run=DOCUMENTS, mesh=MeshConfig(fsdp=8)),
        Case(run=DOCUMENTS, mesh=MeshConfig(replica=4, fsdp=1, tensor=2), accumulate=4),
    ],
    ids=str,
)
def test_the_state_after_three_steps_is_that_of_one_device(case: Case) -> None:
    _, wanted, wanted_metrics = on_one_device()
    _, found, metrics = trained(case)
    assert not too_different(found, wanted)
    for row, wanted_row in zip(metrics, wanted_metrics, strict=True):
        assert row == pytest.approx(wanted_row, rel=1e-5)
