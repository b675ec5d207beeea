"""Evaluation against NumPy: every validation token counts once, also those of the last, shorter batch."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from jaxinfra.data.sequences import split_inputs_targets
from jaxinfra.data.store.store import TokenStore
from jaxinfra.parallel.mesh import make_mesh
from jaxinfra.program import Program, TrainState
from jaxinfra.run import Run, with_mesh_size
from jaxinfra.train.trainer import Trainer
from tests.tiny_run import Tiny

SEQ_LEN, BATCH = 32, 8


def build(run: Run, devices: int = 8) -> Program:
    run = with_mesh_size(run, devices)
    return Program(run, make_mesh(run.mesh, jax.devices()[:devices]))


def found(run: Run, state: TrainState, windows: int | None = None) -> dict[str, float]:
    trainer = Trainer(replace(run, train=replace(run.train, eval_samples=windows)))
    trainer.state = state
    with trainer.program.on_mesh:
        return trainer.evaluate()


def reference(run: Run, params: Any, store: TokenStore, windows: Iterable[int]) -> dict[str, float]:
    """Log-probabilities in NumPy, window by window, in float64, from the logits of the model on one device."""
    program, mask = build(run, devices=1), run.data.mask_documents

    @jax.jit
    def logits(params: Any, batch: Any) -> jax.Array:
        return program.model(params)(batch).materialize()

    eot_id, lengths = store.manifest.tokenizer_info.eot_id, store.tokenizer.byte_lengths()
    loss, tokens, n_bytes = 0.0, 0, 0
    for window in windows:
        ids = store.read("validation", np.array([window * SEQ_LEN]), SEQ_LEN + 1)
        batch = split_inputs_targets(ids, eot_id=eot_id, mask_documents=mask)
        with program.on_mesh:
            logits_TV = np.asarray(logits(params, batch), np.float64)[0]
        log_prob_TV = logits_TV - np.log(np.exp(logits_TV - logits_TV.max()).sum(-1, keepdims=True)) - logits_TV.max()
        for t in range(SEQ_LEN):
            if mask and ids[0, t] == eot_id:
                continue
            target = int(ids[0, t + 1])
            loss, tokens, n_bytes = loss - log_prob_TV[t, target], tokens + 1, n_bytes + int(lengths[target])
    return {"eval/loss": loss / tokens, "eval/bits_per_byte": loss / np.log(2) / n_bytes}


@pytest.mark.parametrize("mask", [True, False], ids=["documents apart", "one stream"])
def test_equals_numpy(tiny: Tiny, mask: bool) -> None:
    run = tiny.loaded(f"data.mask_documents={str(mask).lower()}")
    program, store = build(run), run.data.open().store
    windows = (store.manifest.splits["validation"].tokens - 1) // SEQ_LEN
    assert windows % BATCH, "the last batch must be a shorter one"
    with program.on_mesh:
        state = program.init(jax.random.key(0))
        all_of_them, first = found(run, state), found(run, state, windows=5)
    params = jax.tree.map(np.asarray, state.params)
    assert all_of_them == pytest.approx(reference(run, params, store, range(windows)), rel=1e-5)
    assert first == pytest.approx(reference(run, params, store, range(5)), rel=1e-5)
    assert first != pytest.approx(all_of_them, rel=1e-5)


def test_averaged_parameters_are_evaluated(tiny: Tiny) -> None:
    """Where a run keeps an average, that is what will be used, so that is what is measured."""
    run = tiny.loaded("optim.ema_decay=0.5")
    program = build(run)
    with program.on_mesh:
        state, other = program.init(jax.random.key(0)), program.init(jax.random.key(1))
        swapped = replace(state, ema=other.params)
        plain = replace(other, ema=None)
        assert found(run, swapped) == found(run, plain)
        assert found(run, swapped) != found(run, state)
