"""Dropout on meshes: `test_gradients` compares its masks with those of one device; here is what it changes and when."""

from dataclasses import replace

import jax

from tests.parity.cases import (
    BIASES,
    DROPPING,
    STEP,
    Case,
    batch_on_host,
    evaluated,
    gradients,
    on_one_device,
    put,
    too_different,
)


def test_masks_change_with_the_step_and_the_loss_with_them() -> None:
    """Else the agreement of meshes would say nothing."""
    now, later = on_one_device(DROPPING), gradients(Case(run=DROPPING), step=STEP + 1)
    for other in (later, on_one_device(BIASES)):
        assert len(too_different(now, other)) > len(now) * 0.9


def test_evaluation_drops_nothing() -> None:
    dropping, plain = (evaluated(Case(run=run)) for run in (replace(BIASES, model=DROPPING.model), BIASES))
    assert dropping == plain


def test_each_step_of_training_has_masks_of_its_own() -> None:
    """The same batch and parameters, another step: another loss."""
    program = Case(run=DROPPING).program()
    losses = []
    with program.on_mesh:
        batch = put(batch_on_host(program.run), program.batch)
        for step in (0, 1, 0):
            state = program.init(jax.random.key(0))
            state = replace(state, step=state.step + step)
            losses.append(float(program.train_step(state, batch)[1]["loss"]))
    assert losses[0] == losses[2] != losses[1]
