"""`apply`: the values of texts, the switch of a choice, and errors."""

import math
from dataclasses import dataclass, replace

import pytest

from jaxinfra import config
from jaxinfra.config import apply, validate
from jaxinfra.errors import ConfigError
from tests.refusals import raises

from .deferred import Deferred, Large, Unresolved
from .trees import WSD, Color, Constant, CosineDecay, Run, Source

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
        ("leaves.color", "BLUE", Color.BLUE),
        ("leaves.color", "red-ish", Color.RED),
        ("leaves.color", "2", Color.BLUE),
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
    ("overrides", "named"),
    [
        ("train.steps=ten", "int"),
        ("train.steps=1.5", "int"),
        ("train.steps=0x10", "int"),
        ("train.steps=1e-1", "int"),
        ("train.steps=", "int"),
        ("optim.peak_lr=fast", "float"),
        ("optim.peak_lr=1e400", "float"),
        ("optim.peak_lr=" + "9" * 309, "float"),
        ("leaves.either=1e400", "int float"),
        ("leaves.flag=1", "true false"),
        ("leaves.flag=treu", "true?"),
        ("leaves.maybe=x", "int none"),
        ("leaves.name='open", "str"),
        ("leaves.color=red", "RED BLUE"),
        ("leaves.mode=flas", "dot, none flash?"),
        ("leaves.pairs=(1,)", "(int, str)"),
        ("leaves.names=(a", ""),
        ("optim.betas=1", "(float, float)"),
        ("optim.betas=(1,2]", "(float, float)"),
        ("optim.schedule=cosine", "wsd cosine_decay?"),
        ("optim.other=3", "constant, wsd none"),
        ("train=3", "train.steps, train.global_batch"),
        ("sources=web", "sources.0"),
        ("heavy=needy", "must"),
        ("train.steps", "train.steps=100"),
        ("=3", "train.steps=100"),
        ("train.steps=1 name=x train.steps=2", "train.steps=1 train.steps=2"),
        ("train.step=3", "train.steps?"),
        ("trian.steps=3", "train.steps?"),
        ("trian.step=3", "train.steps?"),
        ("steps=3", "train.steps?"),
        ("train.peak_lr=3", "optim.peak_lr?"),
        ("mesh.zzz=3", "tensor, devices"),
        ("total=3", ""),
        ("sources.1.weight=3", "sources.0.weight?"),
        ("train..steps=3", ""),
        ("train.steps.x=3", "int"),
        ("optim.schedule.decay_steps=3", "optim.schedule=wsd"),
        ("optim.other.warmup_steps=3", "constant wsd; optim.other=constant"),
        ("ema.end=3", "ema=cosine_decay"),
        ("optim.schedule.end=1.0 optim.schedule=wsd", "optim.schedule=wsd optim.schedule.end=1.0"),
        ("optim.schedule=wsd optim.schedule.decay_steps=ten", "optim.schedule.decay_steps=ten: int"),
    ],
)
def test_errors(overrides, named):
    """The message names the path, and an alternative."""
    words = overrides.split()
    with raises(ConfigError, named, words[-1].partition("=")[0]):
        apply(BASE, words)


@pytest.mark.parametrize("digits", [309, 5000])
def test_an_int_too_large_for_a_float_field(digits):
    too_large = replace(BASE, optim=replace(BASE.optim, peak_lr=10**digits))
    with raises(ConfigError, "optim.peak_lr=", "float"):
        validate(too_large)


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


def test_without_an_index_all_items_that_have_the_field_change():
    first, second = BASE.sources[0], Source(store="books")
    both = apply(replace(BASE, sources=(first, second)), ["sources.weight=3"])
    assert both.sources == (replace(first, weight=3.0), replace(second, weight=3.0))
    assert apply(both, ["sources.1.weight=4"]).sources == (both.sources[0], replace(second, weight=4.0))
    with raises(ConfigError, "sources.wait: sources.weight?"):
        apply(BASE, ["sources.wait=3"])


def test_apply_does_not_change_its_argument():
    assert apply(BASE, []) is BASE
    apply(BASE, ["train.steps=1"])
    assert BASE.train.steps == 100


def test_string_annotations_are_resolved():
    run = apply(Deferred(), ["model=large", "model.experts=1,2", "kernel=flash"])
    assert run == Deferred(model=Large(layers=2, experts=(1, 2)), kernel="flash")


def test_an_annotation_that_cannot_be_resolved_is_named():
    with raises(ConfigError, "Unresolved: Decimal, deferred"):
        config.leaves(Unresolved())


def test_an_error_in_post_init_names_the_override():
    @dataclass(frozen=True, kw_only=True)
    class Picky:
        size: int = 1

        def __post_init__(self):
            if self.size < 0:
                raise ValueError("size is negative")

    with raises(ConfigError, "size=-1: size is negative"):
        apply(Picky(), ["size=-1"])
    with raises(ConfigError, "config: Picky size is negative"):
        config.decode(Picky, {"size": -1})
