"""Plots a curve in characters, for terminals and logs."""

import math
from collections.abc import Sequence

from jaxinfra.track.charts import downsample


def plot_curve(points: Sequence[tuple[int, float]], width: int = 72, height: int = 12) -> str:
    """Plots values over rising steps in braille characters, without color codes.

    A single spike stays visible. Values that are not finite are left out; if none is finite, the result is the line "no
    values to draw". `width` and `height`, in characters and lines, include axes and tick labels.
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
