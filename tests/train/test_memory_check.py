"""A run that cannot fit the memory is refused in one line, whose values work; so is one that finds no memory later."""

import jax
import pytest

from jaxinfra.train import memory_check
from jaxinfra.user_code import ending_of
from tests.refusals import mended, refused
from tests.tiny_run import Tiny, launch


def test_a_batch_that_does_not_fit(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The suggested value fits."""
    for name in ("total_bytes", "available_bytes"):
        monkeypatch.setattr(memory_check, name, lambda: 24 * 2.0**20)
    monkeypatch.setattr(memory_check, "return_freed_memory", lambda: None)  # of the process of all tests
    overrides = ["train.global_batch=1024", "train.steps=3", "train.eval_every=3", "name=large"]
    line = refused(tiny.launch(*overrides), "train.global_batch=1024: train step MiB use model.remat=full")
    assert tiny.losses("large") == {}
    fixed = tiny.launch(*mended(overrides, line))
    assert fixed.code == 0 and "may be killed" not in fixed.err, fixed
    refused(
        launch("evaluate", str(tiny.directory("large")), "train.global_batch=4096"),
        "train.global_batch=4096: evaluation",
    )


@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: allocating 9 bytes"), MemoryError()])
def test_no_memory_while_it_runs(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def no_memory(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("jaxinfra.train.training.check_step", no_memory)
    refused(tiny.launch(), "train.global_batch=8: use train.global_batch=")
    ending = ending_of(type(error)(*error.args))  # raised in no code of the user, as in all other commands
    assert ending.code == 81 and "use a smaller batch" in ending.line


def test_other_errors_of_jax_are_bugs() -> None:
    assert ending_of(jax.errors.JaxRuntimeError("INTERNAL: a bug")).code == 1
