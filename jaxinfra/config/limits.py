"""Types with limits that the fields of several config classes share."""

import math
from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt, MinLen

type Count = Annotated[int, Ge(1)]
type Natural = Annotated[int, Ge(0)]
type Positive = Annotated[float, Gt(0), Lt(math.inf)]
type NonNegative = Annotated[float, Ge(0), Lt(math.inf)]
type Share = Annotated[float, Ge(0), Le(1)]
type PositiveShare = Annotated[float, Gt(0), Le(1)]
type Decay = Annotated[float, Ge(0), Lt(1)]
"""The decay of a moving average, or a fraction that must leave something, such as the dropout rate."""
type NonEmpty = Annotated[str, MinLen(1)]
