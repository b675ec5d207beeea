"""A config with open choices, and user classes for them in an importable module."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated

from jaxinfra.config import NOT_FINGERPRINTED, Extensible, Problem
from jaxinfra.config.limits import PositiveFloat


class Optimizer(Extensible, ABC):
    @abstractmethod
    def step(self, x: float) -> float: ...


@dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    beta: float = 0.9
    decay: float = 0.1

    def step(self, x: float) -> float:
        return x - self.decay


@dataclass(frozen=True, kw_only=True)
class Lion:
    beta: float = 0.95


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int = 1


@dataclass(frozen=True, kw_only=True)
class Mine(Optimizer):
    beta: float = 0.5
    scale: PositiveFloat = 2.0
    inner: Inner = field(default_factory=Inner)

    def step(self, x: float) -> float:
        return x * self.scale

    def problems(self) -> Iterable[Problem]:
        if self.beta > 1:
            yield Problem(fields=("beta",), message="must not be above 1", fix="use beta=0.5")


@dataclass(frozen=True, kw_only=True)
class Steeper(AdamW):
    power: int = 2


@dataclass(frozen=True, kw_only=True)
class Needy(Optimizer):
    must: int

    def step(self, x: float) -> float:
        return x


@dataclass(frozen=True, kw_only=True)
class Other:
    beta: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Idle(Optimizer):
    beta: float = 0.5


class Undecorated(Optimizer):
    beta: float = 0.5

    def step(self, x: float) -> float:
        return x


class Adding(AdamW):
    more: int = 1


@dataclass(kw_only=True)
class Thawed(Optimizer):
    beta: float = 0.5

    def step(self, x: float) -> float:
        return x


@dataclass(frozen=True, kw_only=True)
class Kinded(Optimizer):
    kind: str = "x"

    def step(self, x: float) -> float:
        return x


type OptimizerChoice = AdamW | Lion | Optimizer


@dataclass(frozen=True, kw_only=True)
class Run:
    optimizer: OptimizerChoice = field(default_factory=AdamW)
    only: Annotated[Optimizer, NOT_FINGERPRINTED] = field(default_factory=AdamW)
    maybe: Optimizer | None = None
    several: tuple[AdamW | Optimizer, ...] = ()


class Schedule(Extensible):
    builtins = (f"{__name__}:Linear", f"{__name__}:WarmupCosine")


@dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
    end: float = 0.0


@dataclass(frozen=True, kw_only=True)
class WarmupCosine(Schedule):
    end: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Steps(Schedule):
    end: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Scheduled:
    schedule: Schedule = field(default_factory=Linear)
