"""A comparison is left out only for the programs and the JAX for which it has passed."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.golden import proven
from tests.golden.proven import Unless
from tests.parity.cases import TOKEN, Case


@pytest.fixture
def proofs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty file of proofs; a program of these tests is its text."""
    monkeypatch.setattr(proven, "PROOFS", tmp_path / "proofs.json")
    monkeypatch.setattr(proven, "lowered", lambda program, also: program.text)
    monkeypatch.delenv(proven.RECORD, raising=False)
    proven.PROOFS.write_text("{}")
    return proven.PROOFS


def computes(unless_proven: Unless, text: str) -> bool:
    """Whether the check of a program is called."""
    calls = []
    unless_proven(lambda: calls.append(text), SimpleNamespace(text=text))
    return calls == [text]


def test_what_has_changed_is_computed_again(
    unless_proven: Unless, proofs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert computes(unless_proven, "a") and computes(unless_proven, "a"), "only a recording writes"
    new = proofs.with_name("new.json")
    with monkeypatch.context() as recording:
        recording.setenv(proven.RECORD, str(new))
        assert computes(unless_proven, "a") and not computes(unless_proven, "a"), "a recording goes on"
    assert computes(unless_proven, "a")
    new.replace(proofs)
    assert not computes(unless_proven, "a")
    assert computes(unless_proven, "b")
    monkeypatch.setattr(proven, "version", lambda package: "another")
    assert computes(unless_proven, "a")


def test_a_check_that_fails_is_not_recorded(
    unless_proven: Unless, proofs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(proven.RECORD, str(proofs))
    with pytest.raises(ZeroDivisionError):
        unless_proven(lambda: 1 / 0, SimpleNamespace(text="a"))
    assert proofs.read_text() == "{}"


def test_nothing_is_lowered_while_all_code_is_the_recorded_one(
    request: pytest.FixtureRequest, unless_proven: Unless, proofs: Path
) -> None:
    name = request.node.nodeid.rpartition("/")[2]
    for recorded, expected in (
        ({name: "of another program", proven.SOURCES: proven.sources()}, False),
        ({name: "of another program", proven.SOURCES: "of other code"}, True),
        ({proven.SOURCES: proven.sources()}, True),
    ):
        proofs.write_text(json.dumps(recorded))
        assert computes(unless_proven, "a") is expected, recorded


def test_code_is_the_same_with_other_comments(tmp_path: Path) -> None:
    codes = []
    for number, text in enumerate(("def f():\n    'doc'\n    return 1\n", "def f():  # why\n    return 1\n", "f = 1")):
        path = tmp_path / f"{number}.py"
        path.write_text(text)
        codes.append(proven.code_of(path))
    assert codes[0] == codes[1] != codes[2]


@pytest.mark.jax_range
def test_a_test_for_every_jax_is_always_computed(
    unless_proven: Unless, proofs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(proven.RECORD, str(proofs))
    assert computes(unless_proven, "a")
    assert proofs.read_text() == "{}"


@pytest.mark.slow(5)
def test_an_evaluation_or_a_first_state_that_has_changed_is_another_program() -> None:
    same, evaluated, begun = (Case(run=TOKEN).program() for _ in range(3))
    evaluated.__dict__["eval_step"] = lambda params, batch: same.eval_step(params, batch)["loss"]
    begun.__dict__["init"] = lambda key: same.init(key).params
    for changed, name in ((evaluated, "eval_step"), (begun, "init")):
        assert proven.lowered(changed) == proven.lowered(same)
        assert proven.lowered(changed, (name,)) != proven.lowered(same, (name,))
