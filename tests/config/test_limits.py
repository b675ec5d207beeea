"""Limits in annotations: a value outside is refused, with a valid one in the message."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Gt, Interval, Le, Lt

from jaxinfra.config import Problem, apply, decode, dump, encode, fingerprint, leaves, validate
from jaxinfra.config.limits import DecayRate, Fraction, NonEmptyStr, PositiveFloat, PositiveFraction, PositiveInt
from jaxinfra.config.schema import NOT_FINGERPRINTED, describe
from jaxinfra.errors import ConfigError

type AxisSize = Literal[-1] | PositiveInt


@dataclass(frozen=True, kw_only=True)
class Limited:
    required: PositiveInt
    axis: AxisSize = -1
    steps: Annotated[PositiveInt | None, NOT_FINGERPRINTED] = None
    rate: PositiveFloat = 3e-4
    clip: Annotated[float, Gt(0)] | None = 1.0
    dropout: DecayRate = 0.0
    shares: tuple[Fraction, ...] = (0.5,)
    part: PositiveFraction | Literal["auto"] = "auto"
    buckets: Annotated[int, Ge(2), Le(8)] = 4
    names: tuple[NonEmptyStr, ...] = ("a",)

    def problems(self):
        if 100 // self.required == 7:  # which relies on the limit
            yield Problem(fields=("required",), message="is 13 or 14", fix="use required=1")


GOOD = Limited(required=3)


@pytest.mark.parametrize(
    ("field", "values", "works"),
    [
        ("required", (0, -1), 1),
        ("axis", (0, -2), -1),
        ("steps", (0,), None),
        ("rate", (0.0, -1.0, math.inf, math.nan), 3e-4),
        ("clip", (0.0, math.nan), 1.0),
        ("dropout", (-0.1, 1.0, math.nan), 0.0),
        ("shares", ((0.5, 1.1), (-0.1,)), (0.5,)),
        ("part", (0.0, 1.5), "auto"),
        ("buckets", (1, 9), 4),
        ("names", (("",), ("b", "")), ("a",)),
    ],
)
def test_a_value_outside_the_limits_is_refused_and_the_suggested_value_is_valid(
    field: str, values: tuple, works: Any
) -> None:
    for value in values:
        wrong = Limited(**{"required": 3, field: value})
        with pytest.raises(ConfigError) as caught:
            validate(wrong)
        assert caught.value.exit_code == 81
        fix = str(caught.value).rpartition("; use ")[2]
        assert str(caught.value).startswith(f"{field}=") and fix.startswith(f"{field}=")
        corrected = apply(wrong, [fix])
        validate(corrected)
        assert leaves(corrected)[field] == works


@pytest.mark.parametrize(
    "overrides",
    [
        ["axis=1", "steps=1", "rate=1e-9", "clip=inf", "dropout=0.999", "shares=0,1", "part=1", "buckets=2"],
        ["axis=-1", "steps=none", "clip=none", "dropout=0", "shares=()", "part=auto", "buckets=8"],
    ],
)
def test_the_limits_themselves_are_valid(overrides: list[str]) -> None:
    run = apply(GOOD, overrides)
    validate(run)
    assert decode(Limited, encode(run)) == run
    assert apply(GOOD, [line.replace(" = ", "=") for line in dump(run).splitlines()]) == run


def test_an_invalid_default_is_refused_and_the_suggested_value_is_valid() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Unset:
        root: NonEmptyStr = ""

    with pytest.raises(ConfigError, match=r"^root=.*; use root=NAME$"):
        validate(Unset())
    validate(apply(Unset(), ["root=NAME"]))


def test_describe_shows_the_limits() -> None:
    assert describe(Annotated[PositiveInt | None, NOT_FINGERPRINTED]) == "int at least 1 or none"
    assert describe(PositiveFloat) == "float above 0 and finite"
    assert describe(tuple[DecayRate, ...]) == "a tuple of float at least 0 and below 1"
    assert describe(AxisSize) == "-1 or int at least 1"


def test_the_fingerprint_skips_fields_that_are_not_fingerprinted() -> None:
    assert fingerprint(apply(GOOD, ["steps=7"])) == fingerprint(GOOD)
    assert fingerprint(apply(GOOD, ["buckets=7"])) != fingerprint(GOOD)
    assert leaves(GOOD).keys() - leaves(GOOD, fingerprinted_only=True).keys() == {"steps"}


@pytest.mark.parametrize("annotation", [Annotated[int, Interval(ge=1)], Annotated[str, Lt("b")]])
def test_an_unsupported_limit_is_refused(annotation: Any) -> None:
    cls = dataclass(frozen=True, kw_only=True)(
        type("Odd", (), {"__annotations__": {"x": annotation}, "__module__": __name__})
    )
    with pytest.raises(ConfigError, match=r"Odd\.x"):
        validate(cls(x=annotation.__origin__(1)))
