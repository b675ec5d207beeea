"""What experts do on meshes beside their gradients: they are full, and their biases move alike."""

import jax
import numpy as np
import pytest

from jaxinfra.parallel.mesh import MeshConfig
from tests.parity.cases import DOCUMENTS, TIGHT, Case, batch_on_host, gradients, on_one_device, put, too_different


def test_experts_are_full() -> None:
    """Else that nobody drops anything on any mesh would prove nothing."""
    sums = on_one_device(TIGHT)
    load, kept = sums["sum.expert_load"], sums["sum.expert_kept"]
    assert load.shape == (2, 8) and load.sum() == 2 * 3 * 32 * 16
    assert 0.05 < 1 - kept.sum() / load.sum() < 0.5


def test_a_dense_model_takes_the_expert_axis_for_data() -> None:
    dense = Case(run=DOCUMENTS, mesh=MeshConfig(fsdp=2, expert=2, tensor=2), accumulate=2)
    assert not too_different(gradients(dense), on_one_device(DOCUMENTS))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "accumulate"),
    [(MeshConfig(fsdp=2, expert=4), 1), (MeshConfig(replica=2, stage=2, fsdp=1, expert=2), 4)],
    ids=["fsdp-expert", "replica-stage-expert"],
)
def test_biases_move_alike_on_every_mesh(mesh: MeshConfig, accumulate: int) -> None:
    """By the choices of the whole step: of all microbatches, stages and replicas."""

    def biases(case: Case) -> tuple[np.ndarray, dict[str, float]]:
        program = case.program()
        with program.on_mesh:
            state = program.init(jax.random.key(0))
            for step in range(2):
                state, metrics = program.train_step(state, put(batch_on_host(case.run, seed=step), program.batch))
        return np.asarray(state.params["blocks"]["mlp"]["bias"]), {n: float(v) for n, v in metrics.items()}

    wanted, wanted_metrics = biases(Case(run=TIGHT))
    moved, metrics = biases(Case(run=TIGHT, mesh=mesh, accumulate=accumulate))
    assert np.array_equal(moved, wanted) and set(np.round(np.abs(wanted) / 0.05).flat) <= {0, 1, 2}
    assert metrics == pytest.approx(wanted_metrics, rel=1e-5)
