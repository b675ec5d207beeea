"""`apply`: what each text means, what switching a choice keeps, and what each error says."""

import math
from dataclasses import dataclass

import pytest

from jaxinfra import config
from jaxinfra.config import apply
from jaxinfra.errors import ConfigError

from .deferred import Deferred, Large, Unresolved
from .trees import WSD, Colour, Constant, CosineDecay, Run

BASE = Run(name="base")


def value_at(root, path):
    for name in path.split("."):
        root = root[int(name)] if isinstance(root, tuple) else getattr(root, name)
    return root


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("train.steps", "1_000", 1000),
        ("train.steps", "4e3", 4000),
        ("train.steps", "1.5E3", 1500),
        ("train.steps", "-7", -7),
        ("train.steps", " 7 ", 7),
        ("optim.peak_lr", "3e-4", 3e-4),
        ("optim.peak_lr", "1", 1.0),
        ("optim.peak_lr", "inf", math.inf),
        ("leaves.flag", "TRUE", True),
        ("leaves.flag", "false", False),
        ("leaves.name", "bare word", "bare word"),
        ("leaves.name", "'quo\\'ted'", "quo'ted"),
        ("leaves.name", '"none"', "none"),
        ("leaves.name", "none", "none"),
        ("leaves.name", "a=b", "a=b"),
        ("leaves.name", "", ""),
        ("leaves.maybe", "none", None),
        ("leaves.maybe", "NULL", None),
        ("leaves.maybe", "3", 3),
        ("leaves.maybe_name", "'none'", "none"),
        ("leaves.colour", "BLUE", Colour.BLUE),
        ("leaves.colour", "red-ish", Colour.RED),
        ("leaves.colour", "2", Colour.BLUE),
        ("leaves.mode", "flash", "flash"),
        ("leaves.mode", "none", "none"),
        ("leaves.either", "3", 3),
        ("leaves.either", "3e0", 3.0),
        ("leaves.wide", "auto", "auto"),
        ("leaves.wide", "2", 2.0),
        ("leaves.names", "(a, 'b, c')", ("a", "b, c")),
        ("leaves.names", "[a]", ("a",)),
        ("leaves.names", "a,b", ("a", "b")),
        ("leaves.names", "a", ("a",)),
        ("leaves.names", "(a,)", ("a",)),
        ("leaves.names", "()", ()),
        ("leaves.pairs", "(1, a), (2, b)", ((1, "a"), (2, "b"))),
        ("leaves.pairs", "[(1,a)]", ((1, "a"),)),
        ("leaves.text_or_many", "a,b", "a,b"),
        ("leaves.text_or_many", "(a,b)", ("a", "b")),
        ("optim.betas", "0.9, 1", (0.9, 1.0)),
        ("sources.0.weight", "2", 2.0),
        ("sources", "()", ()),
        ("optim.schedule", "wsd", WSD(warmup_steps=10)),
        ("optim.schedule", "constant", Constant(warmup_steps=10)),
        ("optim.schedule", "CosineDecay", CosineDecay()),
        ("optim.other", "wsd", WSD()),
        ("ema", "cosine_decay", CosineDecay()),
    ],
)
def test_text_is_read_by_the_annotation(path, text, expected):
    found = value_at(apply(BASE, [f"{path}={text}"]), path)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.steps=ten"], "train.steps=ten: expected int"),
        (["train.steps=1.5"], "train.steps=1.5: expected int"),
        (["train.steps=0x10"], "train.steps=0x10: expected int"),
        (["train.steps=1e-1"], "train.steps=1e-1: expected int"),
        (["train.steps="], "train.steps=: expected int"),
        (["optim.peak_lr=fast"], "optim.peak_lr=fast: expected float"),
        (["leaves.flag=1"], "leaves.flag=1: expected true or false"),
        (["leaves.flag=treu"], "leaves.flag=treu: expected true or false; did you mean true?"),
        (["leaves.maybe=x"], "leaves.maybe=x: expected int or none"),
        (["leaves.name='open"], "leaves.name='open: expected str"),
        (["leaves.colour=red"], "leaves.colour=red: expected RED or BLUE"),
        (["leaves.mode=flas"], "leaves.mode=flas: expected dot, flash or none; did you mean flash?"),
        (["leaves.pairs=(1,)"], "leaves.pairs=(1,): expected a tuple of a tuple (int, str)"),
        (["leaves.names=(a"], None),
        (["optim.betas=1"], "optim.betas=1: expected a tuple (float, float)"),
        (["optim.betas=(1, 2]"], "optim.betas=(1, 2]: expected a tuple (float, float)"),
        (
            ["optim.schedule=cosine"],
            "optim.schedule=cosine: expected constant, cosine_decay or wsd; did you mean cosine_decay?",
        ),
        (["optim.other=3"], "optim.other=3: expected constant, wsd or none"),
        (
            ["train=3"],
            "train=3: train is not one value but a group of fields; set one of train.steps, train.global_batch",
        ),
        (
            ["sources=web"],
            "sources=web: sources is not one value but a group of fields; set one of sources.0",
        ),
        (["heavy=needy"], "heavy=needy: has no default for must; set it in the config file"),
        (["train.steps"], "train.steps: not an override; write path=value, such as train.steps=100"),
        (["=3"], "=3: not an override; write path=value, such as train.steps=100"),
        (
            ["train.steps=1", "name=x", "train.steps=2"],
            "train.steps=1 and train.steps=2: set twice; keep one of them",
        ),
        (["train.step=3"], "train.step: no such field; did you mean train.steps?"),
        (["trian.steps=3"], "trian.steps: no such field; did you mean train.steps?"),
        (["trian.step=3"], "trian.step: no such field; did you mean train.steps?"),
        (["steps=3"], "steps: no such field; did you mean train.steps?"),
        (["train.peak_lr=3"], "train.peak_lr: no such field; did you mean optim.peak_lr?"),
        (["mesh.zzz=3"], "mesh.zzz: no such field; mesh has tensor, devices"),
        (["total=3"], None),
        (["sources.1.weight=3"], "sources.1.weight: no such field; did you mean sources.0.weight?"),
        (["train..steps=3"], None),
        (
            ["train.steps.x=3"],
            "train.steps.x: train.steps takes int and has no fields; set train.steps itself",
        ),
        (
            ["optim.schedule.decay_steps=3"],
            "optim.schedule.decay_steps: decay_steps is a field of wsd; choose it first with optim.schedule=wsd",
        ),
        (
            ["optim.other.warmup_steps=3"],
            "optim.other.warmup_steps: warmup_steps is a field of constant and of wsd; "
            "choose it first with optim.other=constant",
        ),
        (["ema.end=3"], "ema.end: end is a field of cosine_decay; choose it first with ema=cosine_decay"),
        (
            ["optim.schedule.end=1.0", "optim.schedule=wsd"],
            "optim.schedule=wsd: would discard optim.schedule.end=1.0 before it; put optim.schedule=wsd first",
        ),
        (
            ["optim.schedule=wsd", "optim.schedule.decay_steps=ten"],
            "optim.schedule.decay_steps=ten: expected int",
        ),
    ],
)
def test_errors(overrides, message):
    with pytest.raises(ConfigError) as caught:
        apply(BASE, overrides)
    assert "\n" not in str(caught.value)
    if message is not None:
        assert str(caught.value) == message


def test_a_switch_keeps_fields_of_the_same_name_and_type():
    start = apply(BASE, ["optim.schedule.warmup_steps=77", "optim.schedule.end=0.5"])
    switched = apply(start, ["optim.schedule=wsd"])
    # `end` is a float in one class and an int in the other, so it is not carried over.
    assert switched.optim.schedule == WSD(warmup_steps=77, end=1)


def test_overrides_apply_from_left_to_right():
    run = apply(BASE, ["optim.schedule=wsd", "optim.schedule.decay_steps=5", "ema=cosine_decay", "ema.end=2"])
    assert run.optim.schedule == WSD(warmup_steps=10, decay_steps=5)
    assert run.ema == CosineDecay(end=2.0)


def test_a_kept_field_may_be_set_before_the_switch():
    run = apply(BASE, ["optim.schedule.warmup_steps=5", "optim.schedule=constant"])
    assert run.optim.schedule == Constant(warmup_steps=5)


def test_the_base_is_untouched_and_no_override_is_no_change():
    assert apply(BASE, []) is BASE
    apply(BASE, ["train.steps=1"])
    assert BASE.train.steps == 100


def test_string_annotations_are_resolved():
    run = apply(Deferred(), ["model=large", "model.experts=1,2", "kernel=flash"])
    assert run == Deferred(model=Large(layers=2, experts=(1, 2)), kernel="flash")


def test_an_annotation_that_cannot_be_resolved_is_named():
    with pytest.raises(ConfigError, match=r"^Unresolved: an annotation names Decimal, which \S*deferred does not"):
        config.leaves(Unresolved())


def test_what_a_class_refuses_is_the_fault_of_the_override():
    @dataclass(frozen=True, kw_only=True)
    class Picky:
        size: int = 1

        def __post_init__(self):
            if self.size < 0:
                raise ValueError("size is negative")

    with pytest.raises(ConfigError, match=r"^size=-1: size is negative; use another value$"):
        apply(Picky(), ["size=-1"])
    with pytest.raises(ConfigError, match=r"^config: Picky refused its fields: size is negative$"):
        config.decode(Picky, {"size": -1})
