"""Config classes whose annotations are strings (PEP 563)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from decimal import Decimal


@dataclass(frozen=True, kw_only=True)
class Small:
    layers: int = 2


@dataclass(frozen=True, kw_only=True)
class Large:
    layers: int = 20
    experts: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Deferred:
    model: Small | Large = field(default_factory=Small)
    kernel: Literal["dot", "flash"] = "dot"


@dataclass(frozen=True, kw_only=True)
class Unresolved:
    price: Decimal | None = None
