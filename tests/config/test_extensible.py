"""Open choices: fields that accept user classes by their import paths."""

import json
from dataclasses import dataclass, replace

import pytest

from jaxinfra.config import apply, decode, diff, dump, encode, fingerprint, format_diff, leaves, validate
from jaxinfra.config.classes import ClassFinder
from jaxinfra.config.schema import describe
from jaxinfra.errors import ConfigError
from tests.refusals import problem, raises

from . import extended
from .extended import AdamW, Inner, Lion, Mine, Optimizer, OptimizerChoice, Other, Run, Scheduled, Steeper, Steps

HERE = extended.__name__
BASE = Run(optimizer=Mine(), maybe=Mine(inner=Inner(size=3)), several=(AdamW(), Steeper()))


def test_dump_shows_the_import_paths_of_user_classes() -> None:
    assert dump(BASE) == (
        f"optimizer = {HERE}:Mine\n"
        "optimizer.beta = 0.5\n"
        "optimizer.scale = 2.0\n"
        "optimizer.inner.size = 1\n"
        f"only = {HERE}:AdamW\n"
        "only.beta = 0.9\n"
        "only.decay = 0.1\n"
        f"maybe = {HERE}:Mine\n"
        "maybe.beta = 0.5\n"
        "maybe.scale = 2.0\n"
        "maybe.inner.size = 3\n"
        "several.0 = adam_w\n"
        "several.0.beta = 0.9\n"
        "several.0.decay = 0.1\n"
        f"several.1 = {HERE}:Steeper\n"
        "several.1.beta = 0.9\n"
        "several.1.decay = 0.1\n"
        "several.1.power = 2\n"
    )


def test_decode_reverses_encode() -> None:
    tree = json.loads(json.dumps(encode(BASE)))
    assert tree["optimizer"] == {"kind": f"{HERE}:Mine", "beta": 0.5, "scale": 2.0, "inner": {"size": 1}}
    assert [each["kind"] for each in tree["several"]] == ["adam_w", f"{HERE}:Steeper"]
    assert decode(Run, tree, ClassFinder.from_imports([HERE])) == BASE
    assert decode(Run, tree, ClassFinder.from_config(BASE)) == BASE


def test_classes_of_the_union_keep_their_names_and_fingerprints() -> None:
    assert leaves(Run(optimizer=Lion()))["optimizer"] == "lion"
    assert describe(OptimizerChoice) == "adam_w, lion or MODULE:CLASS (a subclass of Optimizer)"
    assert apply(BASE, ["optimizer=AdamW"]).optimizer == AdamW(beta=0.5)
    assert apply(BASE, [f"optimizer={HERE}:AdamW"]).optimizer == AdamW(beta=0.5)


def test_leaves_given_as_overrides_make_runs_equal() -> None:
    lines = [line.replace(" = ", "=") for line in dump(BASE).splitlines()]
    start = Run(several=(AdamW(), Mine()))
    assert apply(start, lines) == BASE
    assert apply(BASE, lines) == BASE


def test_overrides_set_fields_of_user_classes() -> None:
    run = apply(BASE, ["optimizer.beta=0.25", "optimizer.inner.size=7", "several.1.power=3", "maybe=none"])
    assert run.optimizer == Mine(beta=0.25, inner=Inner(size=7))
    assert run.several == (AdamW(), Steeper(power=3)) and run.maybe is None


def test_an_override_switches_to_a_class_and_keeps_fields_of_the_same_name_and_type() -> None:
    run = apply(Run(), ["optimizer.beta=0.7", f"optimizer={HERE}:Mine", "optimizer.scale=3", f"maybe='{HERE}:Steeper'"])
    assert run.optimizer == Mine(beta=0.7, scale=3.0) and run.maybe == Steeper()


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("optimizer=no.such:Mine", "no.such"),
        (f"optimizer={HERE}.more:Mine", f"{HERE}.more"),
        (f"optimizer={HERE}:Mime", f"{HERE}:Mime: class Mime"),
        (f"optimizer={HERE}:step", f"{HERE} step"),
        (f"optimizer={HERE}:", f"{HERE}:"),
        ("optimizer=..x:Mine", "..x:Mine package.module:Class"),
        ("optimizer=x.py:Mine", "x.py"),
        (f"optimizer={HERE}:Other", f"adam_w, lion Other; inherit from {HERE}:Optimizer"),
        ("optimizer=json:JSONDecoder", f"JSONDecoder inherit from {HERE}:Optimizer"),
        (f"optimizer={HERE}:Optimizer", "extended.py step"),
        (f"optimizer={HERE}:Idle", "extended.py step Optimizer; def step("),
        (f"optimizer={HERE}:Undecorated", "extended.py @dataclass(frozen=True, kw_only=True)"),
        (f"optimizer={HERE}:Adding", "extended.py @dataclass(frozen=True, kw_only=True)"),
        (f"optimizer={HERE}:Thawed", "extended.py frozen @dataclass(frozen=True, kw_only=True)"),
        (f"optimizer={HERE}:Kinded", "extended.py kind rename"),
        (f"optimizer={HERE}:Needy", "must config file"),
        ("optimizer=adam", "adam_w? MODULE:CLASS"),
        ("optimizer=3", "adam_w, lion MODULE:CLASS Optimizer"),
        ("optimizer.bta=3", "optimizer.beta?"),
        ("optimizer.scale=big", "float"),
        ("optimizer.decay=3", "optimizer=adam_w"),
    ],
)
def test_errors_of_overrides(override: str, named: str) -> None:
    with raises(ConfigError, named, override.partition("=")[0]):
        apply(BASE, [override])


def test_creating_an_incomplete_class_is_an_error() -> None:
    with raises(ConfigError, f"{HERE}:Idle {extended.__file__} step Optimizer; def step("):
        extended.Idle()
    with raises(ConfigError, f"{HERE}:Undecorated {extended.__file__} @dataclass"):
        extended.Undecorated()


def test_validation_checks_user_classes() -> None:
    validate(BASE)
    problem(replace(BASE, optimizer=Mine(beta=2.0)), "optimizer.beta=2.0: use optimizer.beta=0.5")
    problem(replace(BASE, several=(Mine(scale=-1.0),)), "several.0.scale=-1.0: above 0 use several.0.scale=2.0")
    problem(replace(BASE, optimizer=Mine(beta="x")), "optimizer.beta=x: float")
    assert type(leaves(Run(optimizer=Mine(beta=1)))["optimizer.beta"]) is float


def test_a_dataclass_that_does_not_inherit_from_the_base_is_refused() -> None:
    for check in (validate, leaves, encode, lambda run: apply(run, [])):
        with raises(ConfigError, f"optimizer=other: adam_w, lion Other; inherit from {HERE}:Optimizer"):
            check(Run(optimizer=Other()))
    with raises(ConfigError, f"maybe=lion: Optimizer none, Lion; inherit {HERE}:Optimizer"):
        validate(Run(maybe=Lion()))


def test_differences_name_the_classes() -> None:
    assert format_diff(diff(Run(optimizer=Mine(beta=0.9)), Run())).splitlines()[0].split() == [
        *("optimizer", f"{HERE}:Mine", "->", "adam_w")
    ]


def test_the_fingerprint_has_the_name_of_the_class() -> None:
    def made(name: str) -> Optimizer:
        cls = type(name, (Mine,), {"__module__": HERE, "__qualname__": name})
        return dataclass(frozen=True, kw_only=True)(cls)()

    assert fingerprint(Run(optimizer=made("One"))) == fingerprint(Run(optimizer=made("One")))
    assert fingerprint(Run(optimizer=made("One"))) != fingerprint(Run(optimizer=made("Two")))
    assert fingerprint(Run(only=made("One"))) == fingerprint(Run())


def test_builtins_of_an_open_base_have_snake_case_names() -> None:
    run = apply(Scheduled(), ["schedule=warmup_cosine"])
    assert dump(run) == "schedule = warmup_cosine\nschedule.end = 0.0\n"
    assert decode(Scheduled, encode(run)) == run
    assert dump(Scheduled(schedule=Steps())).startswith(f"schedule = {HERE}:Steps\n")
    assert apply(run, [f"schedule={HERE}:WarmupCosine"]) == run
    with raises(ConfigError, "schedule=warmup: linear, warmup_cosine MODULE:CLASS Schedule) warmup_cosine?"):
        apply(run, ["schedule=warmup"])
