"""A curve drawn in characters, for a terminal or a log, by plotext; the report has the exact one."""

import math
from collections.abc import Sequence

_POINTS_PER_COLUMN = 4


def curve(points: Sequence[tuple[int, float]], width: int = 72, height: int = 12) -> str:
    """Draws values over steps in braille characters, with ticks on both axes and no color codes.

    A single spike among many values stays visible. Values that are not finite are left out; without a finite value the
    result is the line "no values to draw".

    Args:
        points: (step, value), by rising step.
        width: characters of a line, tick labels included.
        height: lines, both axes included.
    """
    import plotext

    finite = [point for point in points if math.isfinite(point[1])]
    if not finite:
        return "no values to draw"
    steps, values = zip(*_extremes(finite, _POINTS_PER_COLUMN * width), strict=True)
    figure = plotext.figure
    figure.clear()
    figure.plot_size(width, height)
    ends = sorted({steps[0], steps[-1]})
    figure.ruler("x").ticks(ends, [f"{step:,}" for step in ends])
    figure.draw(figure.signal(steps, values, marker="braille").lines())
    return plotext.uncolorize(figure.build().string()).rstrip()


def _extremes(points: Sequence[tuple[int, float]], count: int) -> Sequence[tuple[int, float]]:
    """At most about `count` points: the first, the last, and the lowest and highest of equal groups between."""
    size = -(-2 * len(points) // count)
    if size <= 2:
        return points
    chosen = {0, len(points) - 1}
    for start in range(0, len(points), size):
        group = range(start, min(start + size, len(points)))
        chosen |= {min(group, key=lambda i: points[i][1]), max(group, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(chosen)]
