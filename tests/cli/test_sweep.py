"""Sweeps over fields: what is run, skipped, refused and printed; and the check of activations over widths."""

import pytest

from jaxinfra.cli.sweep import parse_axis
from tests.refusals import preempted, refused
from tests.tiny_run import Ended, Tiny

SMALL = ("name=small", "train.steps=2", "train.eval_every=none", "track.console=off", "model.num_layers=1")


def swept(tiny: Tiny, *arguments: str) -> Ended:
    return tiny.launch(*SMALL, "--sweep", "optim.peak_lr=1e-3,1e30", *arguments)


def rows(out: str) -> list[list[str]]:
    """The rows of the tables."""
    return [line.split() for line in out.splitlines() if line.split()[:1] in (["1e-3"], ["1e30"])]


def test_a_sweep_goes_on_after_a_stop(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXINFRA_FAIL", "step:0:1:term")
    preempted(swept(tiny), "peak_lr=1e-3")
    monkeypatch.delenv("JAXINFRA_FAIL")
    ended = swept(tiny)
    assert ended.code == 0, ended.err
    first, second, done, failed = rows(ended.out)
    assert "finished" not in first and second[1:3] == ["not", "begun"]
    assert (done[1], done[-1], failed[1]) == ("finished", "best", "failed")
    again = swept(tiny)
    assert again.code == 0 and "run 1 of" not in again.out  # nothing is trained again
    shown = tiny.launch(command="runs", config=tiny.runs / "small-sweep")
    assert rows(shown.out) == [done, failed]


def test_a_sweep_is_refused_before_it_begins(tiny: Tiny) -> None:
    for axis, *named in (
        ("optim.peak_rl=1,2", "optim.peak_rl optim.peak_lr"),
        ("optim.peak_lr=1e-3,fast", "optim.peak_lr fast"),
        ("optim.peak_lr=1e-3,1e-3", "--sweep optim.peak_lr"),
        ("optim.peak_lr=1e-3,2e-3 seed=1", "--sweep seed=1"),
        ("init=a/b,a_b", "--sweep same name"),
        ("name=a,b", "name"),
        ("adapter.rank=2,4000 adapter=lora,lora init=hf:none,hf:none", "init"),
        ("model.layers.mixer.num_heads=4,7", "num_heads"),
        ("data.store=no-store,nor-this", "no-store"),
    ):
        refused(tiny.launch(*SMALL, "--sweep", axis), *named)
    assert not tiny.runs.exists()


def test_values_may_have_commas() -> None:
    axis = parse_axis("optim.decay_roles=(matrix,embedding),(matrix) seed=1,2")
    assert axis == [
        {"optim.decay_roles": "(matrix,embedding)", "seed": "1"},
        {"optim.decay_roles": "(matrix)", "seed": "2"},
    ]


def test_activations_grow_without_mup(tiny: Tiny) -> None:
    check = ("optim.peak_lr=1e-2", "model.num_layers=1", "--widths", "64,256", "--steps", "8")
    refused(tiny.launch(*check, command="coordinate-check"), "optim.parametrization=mup")
    ended = tiny.launch(*check, "optim.parametrization=mup", "optim.base_width=64", command="coordinate-check")
    assert ended.code == 0, ended.err
    assert all(name in ended.out for name in ("attention output", "MLP output", "logits", "residual stream"))
