"""Types with limits that the fields of several config classes share."""

import math
from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt, MinLen

type PositiveInt = Annotated[int, Ge(1)]
type NonNegativeInt = Annotated[int, Ge(0)]
type PositiveFloat = Annotated[float, Gt(0), Lt(math.inf)]
type NonNegativeFloat = Annotated[float, Ge(0), Lt(math.inf)]
type Fraction = Annotated[float, Ge(0), Le(1)]
type PositiveFraction = Annotated[float, Gt(0), Le(1)]
type DecayRate = Annotated[float, Ge(0), Lt(1)]
"""The decay of a moving average, or a fraction that must leave something, such as the dropout rate."""
type NonEmptyStr = Annotated[str, MinLen(1)]
