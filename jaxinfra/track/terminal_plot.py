"""A curve drawn in characters, for a terminal or a log, by plotext; the report has the exact one."""

import math
from collections.abc import Sequence

from jaxinfra.track.charts import downsample


def plot_curve(points: Sequence[tuple[int, float]], width: int = 72, height: int = 12) -> str:
    """Draws values over rising steps in braille characters, with ticks on both axes and no color codes.

    A single spike among many values stays visible. Values that are not finite are left out; without a finite value the
    result is the line "no values to draw". Width and height, in characters and lines, include axes and tick labels.
    """
    import plotext

    finite = [point for point in points if math.isfinite(point[1])]
    if not finite:
        return "no values to draw"
    steps, values = zip(*downsample(finite, 2 * width), strict=True)
    figure = plotext.figure
    figure.clear()
    figure.plot_size(width, height)
    ends = sorted({steps[0], steps[-1]})
    figure.ruler("x").ticks(ends, [f"{step:,}" for step in ends])
    figure.draw(figure.signal(steps, values, marker="braille").lines())
    return plotext.uncolorize(figure.build().string()).rstrip()
