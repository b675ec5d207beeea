"""A curve drawn in braille characters, for a terminal or a log; the report has the exact one.

Every character is two dots wide and four high. A column of dots covers all values that fall into it, from the
smallest to the largest, so that a single spike among many values stays visible.
"""

import math
from collections.abc import Sequence

from jaxinfra.track.text import number

_BLANK = 0x2800  # U+2800, the braille pattern with no dot raised
_DOT_BITS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # [row][column], Unicode chapter 21


def curve(values: Sequence[float], width: int = 72, height: int = 10, *, steps: tuple[int, int] | None = None) -> str:
    """Draws `values`, in order, as `height` lines of braille and one line for the axis below.

    Values that are not finite leave a gap. Without a finite value the result is the line "no values to draw".

    Args:
        values: any number of floats.
        width: characters of the longest line, the labels of the vertical axis included; at least 20.
        height: lines of the plot, at least 2.
        steps: what to write under the first and the last value; their indices if None.

    Raises:
        ValueError: `width` or `height` is too small.
    """
    if width < 20 or height < 2:
        raise ValueError(f"a curve of {width} x {height} characters: needs at least 20 x 2")
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "no values to draw"
    low, high = min(finite), max(finite)
    labels = {0: number(high), height - 1: number(low)} if high > low else {(height - 1) // 2: number(high)}
    margin = max(map(len, labels.values()))
    plot_width = width - margin - 2
    spans = _spans(values, low, high, plot_width * 2, height * 4)
    lines = [f"{labels.get(row, ''):>{margin}} ┤{_braille(spans, row)}".rstrip(chr(_BLANK)) for row in range(height)]
    first, last = steps or (0, len(values) - 1)
    axis = f"{first:,}" if first == last else f"{first:,}{f'{last:,}':>{plot_width - len(f'{first:,}')}}"
    return "\n".join([*lines, " " * (margin + 2) + axis])


def _spans(values: Sequence[float], low: float, high: float, columns: int, rows: int) -> list[tuple[int, int] | None]:
    """Returns for each column of dots its (top, bottom) row of dots, joined to the column before, or None."""
    buckets: list[list[float]] = [[] for _ in range(columns)]
    columns_per_value = (columns - 1) / max(len(values) - 1, 1)
    gaps = {round(i * columns_per_value) for i, value in enumerate(values) if not math.isfinite(value)}
    for i, value in enumerate(values):
        if math.isfinite(value):
            buckets[round(i * columns_per_value)].append(value)
    rows_per_unit = (rows - 1) / (high - low) if high > low else 0.0
    flat = (rows - 4) // 8 * 4 + 1 if high == low else 0  # a constant runs beside its label, in the middle
    spans: list[tuple[int, int] | None] = [None] * columns
    previous: tuple[int, int] | None = None  # column and row of the last dot, to join to
    for column, bucket in enumerate(buckets):
        if not bucket:
            previous = None if column in gaps else previous
            continue
        top, bottom, start, end = (
            flat + round((high - value) * rows_per_unit) for value in (max(bucket), min(bucket), bucket[0], bucket[-1])
        )
        spans[column] = (top, bottom)
        if previous is not None:
            _join(spans, previous, (column, start))
        previous = (column, end)
    return spans


def _join(spans: list[tuple[int, int] | None], left: tuple[int, int], right: tuple[int, int]) -> None:
    """Draws the line between two dots, each (column, row), into the columns from one to the other."""
    (left_column, left_row), (right_column, right_row) = left, right
    slope = (right_row - left_row) / (right_column - left_column)
    for column in range(left_column + 1, right_column + 1):
        ends = [round(left_row + slope * (column - left_column - back)) for back in (0.5, 0)]
        own = spans[column] or (ends[1], ends[1])
        spans[column] = (min(own[0], *ends), max(own[1], *ends))


def _braille(spans: Sequence[tuple[int, int] | None], row: int) -> str:
    """Draws line `row` of characters: the dots of rows 4 row to 4 row + 3, two columns a character."""
    characters: list[str] = []
    for left in range(0, len(spans), 2):
        bits = 0
        for side in (0, 1):
            span = spans[left + side]
            for dot in range(4):
                if span is not None and span[0] <= 4 * row + dot <= span[1]:
                    bits |= _DOT_BITS[dot][side]
        characters.append(chr(_BLANK + bits))
    return "".join(characters)
