"""Validation, views and encoding of a config."""

import dataclasses
import json
import math
import random
from dataclasses import dataclass, field

import pytest

from jaxinfra.config import (
    ABSENT,
    Difference,
    apply,
    decode,
    diff,
    dump,
    encode,
    fingerprint,
    format_diff,
    leaves,
    validate,
)
from jaxinfra.config.aliases import FORMER
from jaxinfra.config.codec import complete
from jaxinfra.errors import ConfigError
from tests.refusals import problem, raises

from .trees import WSD, CosineDecay, Leaves, Mesh, Optim, Run, Source, Train, random_run

BASE = Run(name="base")


def test_random_runs_survive_json():
    rng = random.Random(0)
    for _ in range(300):
        run = random_run(rng)
        again = decode(Run, json.loads(json.dumps(encode(run), allow_nan=False)))
        assert again == run
        assert dump(again) == dump(run)


def test_leaves_given_as_overrides_make_any_run_equal():
    rng = random.Random(1)
    for _ in range(200):
        one, other = random_run(rng), random_run(rng)
        overrides = [line.replace(" = ", "=", 1) for line in dump(other).splitlines()]
        assert apply(one, overrides) == other
        differences = [f"{each.path}={each.right!r}" for each in diff(apply(one, overrides), other)]
        assert differences == []


def test_nan_survives_and_equals_itself_in_a_diff():
    run = dataclasses.replace(BASE, leaves=Leaves(ratio=math.nan))
    again = decode(Run, json.loads(json.dumps(encode(run), allow_nan=False)))
    assert math.isnan(again.leaves.ratio)
    assert diff(run, again) == []


def test_encode_adds_a_kind_to_choices_only():
    tree = encode(apply(BASE, ["ema=cosine_decay"]))
    assert tree["optim"]["schedule"] == {"kind": "cosine_decay", "warmup_steps": 10, "end": 0.1}
    assert tree["ema"]["kind"] == "cosine_decay"
    assert "kind" not in tree["optim"]
    assert tree["leaves"]["color"] == "RED"
    assert tree["sources"] == [{"store": "web", "weight": 1.0}]


@pytest.mark.parametrize(
    ("tree", "named"),
    [
        ({}, "name: str"),
        ([], "config=[]: run"),
        ({"name": 3}, "name=3: str"),
        ({"name": "x", "trian": {}}, "trian: train?"),
        ({"name": "x", "train": {"qq": 1}}, "train.qq: steps, global_batch"),
        ({"name": "x", "train": {"steps": "1"}}, 'train.steps="1": int'),
        ({"name": "x", "train": {"steps": 1.0}}, "train.steps=1.0: int"),
        ({"name": "x", "train": {"steps": True}}, "train.steps=true: int"),
        ({"name": "x", "train": 3}, "train=3: train"),
        ({"name": "x", "leaves": {"color": "GREEN"}}, 'leaves.color="GREEN": RED BLUE'),
        ({"name": "x", "leaves": {"pairs": [[1, 2]]}}, "leaves.pairs.0.1=2: str"),
        ({"name": "x", "optim": {"betas": [1]}}, "optim.betas=[1]: (float, float)"),
        ({"name": "x", "sources": [{}]}, "sources.0.store: str"),
        ({"name": "x", "optim": {"schedule": {"end": 1}}}, "optim.schedule.kind: constant, wsd"),
        ({"name": "x", "optim": {"schedule": {"kind": "step"}}}, 'optim.schedule.kind="step": constant, wsd'),
    ],
)
def test_decode_errors(tree, named):
    with raises(ConfigError, named):
        decode(Run, tree)
    complete(Run, tree)  # to be looked at


def test_decode_uses_the_defaults_of_missing_fields():
    assert decode(Run, {"name": "x", "train": {"steps": 3}}) == Run(name="x", train=Train(steps=3))


def test_decode_reads_the_former_name_of_a_field(monkeypatch):
    monkeypatch.setitem(FORMER, "Train", {"num_steps": "steps"})
    assert decode(Run, {"name": "x", "train": {"num_steps": 3}}) == Run(name="x", train=Train(steps=3))


def test_a_tree_is_completed_without_its_classes(monkeypatch):
    monkeypatch.setitem(FORMER, "Train", {"num_steps": "steps"})
    own = {"kind": "own.py:Mine", "factor": 2.0}
    found = complete(Run, {"name": "x", "train": {"num_steps": 3}, "ema": own, "gone": [1]})
    assert found == encode(Run(name="x", train=Train(steps=3))) | {"ema": own, "gone": [1]}
    rng = random.Random(2)
    for _ in range(50):
        tree = encode(random_run(rng))
        assert complete(Run, tree) == tree


def test_an_ambiguous_stored_form_is_refused():
    @dataclass(frozen=True, kw_only=True)
    class Ambiguous:
        value: float | str = 1.0

    assert decode(Ambiguous, encode(Ambiguous(value="fine"))) == Ambiguous(value="fine")
    with raises(ConfigError, "value='inf'"):
        encode(Ambiguous(value="inf"))


def test_leaves_are_in_the_order_of_the_fields_and_include_choices():
    found = leaves(apply(BASE, ["optim.schedule=wsd"]))
    paths = list(found)
    assert paths[:3] == ["name", "train.steps", "train.global_batch"]
    start = paths.index("optim.schedule")
    assert paths[start : start + 4] == [
        "optim.schedule",
        "optim.schedule.warmup_steps",
        "optim.schedule.end",
        "optim.schedule.decay_steps",
    ]
    assert found["optim.schedule"] == "wsd"
    assert found["ema"] is None
    assert found["sources.0.weight"] == 1.0
    assert "total" not in found
    assert leaves(dataclasses.replace(BASE, sources=()))["sources"] == ()


def test_dump():
    assert dump(Optim(betas=(1, 0.95), other=WSD())) == (
        "peak_lr = 0.0003\n"
        "schedule = cosine_decay\n"
        "schedule.warmup_steps = 10\n"
        "schedule.end = 0.1\n"
        "other = wsd\n"
        "other.warmup_steps = 20\n"
        "other.end = 1\n"
        "other.decay_steps = 30\n"
        "betas = (1.0, 0.95)\n"
    )


def test_an_int_in_a_float_field_is_the_float():
    whole, real = Source(store="web", weight=1), Source(store="web", weight=1.0)
    assert fingerprint(whole) == fingerprint(real)
    assert type(leaves(whole)["weight"]) is float
    assert type(encode(whole)["weight"]) is float


def test_diff_shows_absent_paths_beside_their_neighbors():
    left = apply(BASE, ["train.steps=7"])
    right = apply(BASE, ["optim.schedule=wsd"])
    differences = diff(left, right)
    assert differences == [
        Difference(path="train.steps", left=7, right=100),
        Difference(path="optim.schedule", left="cosine_decay", right="wsd"),
        Difference(path="optim.schedule.end", left=0.1, right=1),
        Difference(path="optim.schedule.decay_steps", left=ABSENT, right=30),
    ]
    assert format_diff(differences) == (
        "train.steps                 7            -> 100\n"
        "optim.schedule              cosine_decay -> wsd\n"
        "optim.schedule.end          0.1          -> 1\n"
        "optim.schedule.decay_steps  absent       -> 30"
    )
    assert format_diff([]) == ""


def test_the_fingerprint_depends_on_values_only():
    other = apply(BASE, ["name=other", "train.steps=7"])
    assert len(fingerprint(BASE)) == 16
    assert fingerprint(BASE) == fingerprint(Run(name="base"))
    assert fingerprint(BASE) != fingerprint(other)
    # Two classes with the same fields and values are different choices.
    assert fingerprint(apply(BASE, ["heavy=constant"])) == fingerprint(BASE)


def test_validate_checks_parts_before_the_whole():
    bad_mesh = Mesh(tensor=3)
    for run in (Run(name="x", optim=Optim(peak_lr=-1.0)), Run(name="x", mesh=bad_mesh, optim=Optim(peak_lr=-1.0))):
        problem(run, "optim.peak_lr=-1.0: use optim.peak_lr=3e-4")
    problem(Run(name="x", mesh=bad_mesh), "mesh.tensor=3, mesh.devices=4: use mesh.tensor=2")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://AKIA:sEcReT@bucket/x", "s3://***@bucket/x"),
        ("https://host/x?v=1&X-Amz-Signature=sEcReT&y=2", "https://host/x?v=1&X-Amz-Signature=***&y=2"),
        ("az://x?sv=1&sig=sEcReT", "az://x?sv=1&sig=***"),
        ('"https://h/x?sig=sEcReT", (http://h?token=sEcReT"s).', '"https://h/x?sig=***", (http://h?token=***).'),
        ("https://user:sEc@rEt@host/x", "https://***@host/x"),
        ("https://host/x#access_token=sEcReT", "https://host/x#access_token=***"),
        ("https://host/x?a=1&amp;client_secret=sEcReT", "https://host/x?a=1&amp;client_secret=***"),
        ("https://host/x?token=...", "https://host/x?token=***"),
        ("see http://user:sEcReT@host/ " + "and more " * 20, "see http://***@host/ and"),
    ],
)
def test_credentials_are_refused_and_not_shown(url, shown):
    line = problem(Run(name=url), "name=")
    assert "sEcReT" not in line and shown in line


def test_text_that_looks_like_credentials_is_valid():
    validate(BASE)
    for text in ("a:b@c", "s3://bucket/a@b:c", "https://host/x?design=1", "me@example.com", "git@host:x/y.git"):
        validate(Run(name=text))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"name": 3}, "name=3: str"),
        ({"train": Train(steps=1.5)}, "train.steps=1.5: int"),
        ({"train": Train(steps=True)}, "train.steps=true: int"),
        ({"train": Mesh()}, "train=mesh: train, Mesh"),
        ({"leaves": Leaves(names=["a"])}, "leaves.names=['a']: str, list"),
        ({"leaves": Leaves(mode="fast")}, "leaves.mode=fast: dot, flash none"),
        ({"leaves": Leaves(color="RED")}, "leaves.color=RED: RED BLUE"),
        ({"sources": (Source(store=1),)}, "sources.0.store=1: str"),
        ({"optim": Optim(schedule=None)}, "optim.schedule=none: constant, wsd"),
    ],
)
def test_a_value_that_does_not_fit_its_annotation_is_refused(change, named):
    run = dataclasses.replace(BASE, **change)
    for check in (validate, leaves, encode, lambda run: apply(run, [])):
        with raises(ConfigError, named):
            check(run)


def test_a_subclass_of_a_class_in_a_union_is_refused():
    @dataclass(frozen=True, kw_only=True)
    class Steeper(CosineDecay):
        power: float = 2.0

    with raises(ConfigError, "optim.schedule=steeper: constant, wsd"):
        encode(Run(name="x", optim=Optim(schedule=Steeper())))


def test_unsupported_annotations_are_refused():
    @dataclass(frozen=True, kw_only=True)
    class Holder:
        table: dict[str, int] = field(default_factory=dict)

    @dataclass(frozen=True, kw_only=True)
    class Kinded:
        kind: str = "x"

    @dataclass(frozen=True, kw_only=True)
    class Chooser:
        part: Kinded | None = None

    @dataclass(frozen=True, kw_only=True)
    class Tuples:
        either: tuple[int, ...] | tuple[str, str] = ()

    with raises(ConfigError, "Tuples.either: one tuple"):
        leaves(Tuples())
    with raises(ConfigError, "Holder.table: dict"):
        leaves(Holder())
    with raises(ConfigError, "Chooser.part: Kinded, kind"):
        leaves(Chooser())
