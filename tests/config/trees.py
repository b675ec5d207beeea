"""Config classes with every kind of field, and random instances of them."""

import enum
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import getitem
from typing import Literal, Optional, Union

from jaxinfra.config import Problem


class Color(enum.Enum):
    RED = "red-ish"
    BLUE = 2


@dataclass(frozen=True, kw_only=True)
class Constant:
    warmup_steps: int = 0


@dataclass(frozen=True, kw_only=True)
class CosineDecay:
    warmup_steps: int = 10
    end: float = 0.1


@dataclass(frozen=True, kw_only=True)
class WSD:
    warmup_steps: int = 20
    end: int = 1
    decay_steps: int = 30


@dataclass(frozen=True, kw_only=True)
class Needy:
    must: int


type Schedule = Constant | CosineDecay | WSD

# Optional[Union[Constant, WSD]] must read like `Constant | WSD | None`; written so that no linter changes it.
OlderSpelling = getitem(Optional, getitem(Union, (Constant, WSD)))


@dataclass(frozen=True, kw_only=True)
class Optim:
    peak_lr: float = 3e-4
    schedule: Schedule = field(default_factory=CosineDecay)
    other: OlderSpelling = None
    betas: tuple[float, float] = (0.9, 0.95)

    def problems(self) -> Iterable[Problem]:
        if self.peak_lr <= 0:
            yield Problem(fields=("peak_lr",), message="must be positive", fix="use peak_lr=3e-4")


@dataclass(frozen=True, kw_only=True)
class Source:
    store: str
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Leaves:
    flag: bool = False
    count: int = 0
    ratio: float = 0.0
    name: str = "plain"
    maybe: int | None = None
    maybe_name: str | None = None
    color: Color = Color.RED
    mode: Literal["dot", "flash", "none"] = "dot"
    either: int | float = 1
    wide: Literal["auto"] | float | None = "auto"
    names: tuple[str, ...] = ()
    pairs: tuple[tuple[int, str], ...] = ()
    text_or_many: str | tuple[str, ...] = ""


@dataclass(frozen=True, kw_only=True)
class Train:
    steps: int = 100
    global_batch: int = 8


@dataclass(frozen=True, kw_only=True)
class Mesh:
    tensor: int = 1
    devices: int = 4


@dataclass(frozen=True, kw_only=True)
class Run:
    name: str
    train: Train = field(default_factory=Train)
    mesh: Mesh = field(default_factory=Mesh)
    optim: Optim = field(default_factory=Optim)
    leaves: Leaves = field(default_factory=Leaves)
    sources: tuple[Source, ...] = (Source(store="web"),)
    ema: CosineDecay | None = None
    heavy: Constant | Needy = field(default_factory=Constant)
    total: int = field(init=False, default=0)

    def problems(self) -> Iterable[Problem]:
        if self.mesh.devices % self.mesh.tensor:
            yield Problem(
                fields=("mesh.tensor", "mesh.devices"),
                message="tensor must divide the devices",
                fix="use mesh.tensor=2",
            )


_WORDS = ("", "none", "None", "a,b", "(a)", "it's", 'a "b"', "1", "nan", "x=y", " pad ", "ü", "\n", "plain", "/a/b")


def random_run(rng: random.Random) -> Run:
    """Returns a run with random values in every field."""

    def real() -> float:
        return rng.choice([rng.gauss(0, 1), 10.0 ** rng.randint(-300, 300), math.inf, -math.inf, -0.0, 3.0])

    def word() -> str:
        return rng.choice(_WORDS)

    def schedule() -> Schedule:
        constant = Constant(warmup_steps=rng.randrange(9))
        wsd = WSD(end=rng.randrange(9), decay_steps=rng.randrange(9))
        return rng.choice([constant, CosineDecay(end=real()), wsd])

    wsd = WSD(decay_steps=rng.randrange(9))
    leaves = Leaves(
        flag=rng.random() < 0.5,
        count=rng.randrange(-(10**18), 10**18),
        ratio=real(),
        name=word(),
        maybe=rng.choice([None, 7]),
        maybe_name=rng.choice([None, word()]),
        color=rng.choice(list(Color)),
        mode=rng.choice(["dot", "flash", "none"]),
        either=rng.choice([3, 3.0, 1e22]),
        wide=rng.choice(["auto", None, real()]),
        names=tuple(word() for _ in range(rng.randrange(3))),
        pairs=tuple((rng.randrange(9), word()) for _ in range(rng.randrange(3))),
        text_or_many=rng.choice([word(), (word(),), (), (word(), word())]),
    )
    return Run(
        name=word(),
        train=Train(steps=rng.randrange(1000)),
        optim=Optim(peak_lr=real(), schedule=schedule(), other=rng.choice([None, wsd]), betas=(real(), real())),
        leaves=leaves,
        sources=(Source(store=word(), weight=real()),),
        ema=rng.choice([None, CosineDecay(end=real())]),
    )
