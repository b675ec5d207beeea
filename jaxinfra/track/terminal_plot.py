"""Plots a curve in characters, for terminals and logs."""

from collections.abc import Sequence

import numpy as np

from jaxinfra.track.charts import downsample

_ASCII_FRAME = str.maketrans("─│┤┴┬┼┌┐└┘├", "-||++++++++")


def plot_curve(
    points: Sequence[tuple[int, float]],
    width: int = 72,
    height: int = 12,
    *,
    names: Sequence[str] = (),
    ascii: bool = False,
) -> str:
    """Plots values over rising steps in braille characters, or in ASCII, without color codes.

    A single spike stays visible. Values that are not finite are left out; if none is finite, the result is the line "no
    values to draw". `names` label the steps 0, 1 and so on, by default with their numbers. `width` and `height`, in
    characters and lines, include axes and tick labels.
    """
    import plotext

    steps, values = np.array([step for step, _ in points], int), np.array([value for _, value in points], float)
    kept = np.flatnonzero(np.isfinite(values))
    if not len(kept):
        return "no values to draw"
    kept = kept[downsample(values[kept], 2 * width)]
    figure = plotext.figure
    figure.clear()
    figure.plot_size(width, height)
    ends = sorted({int(steps[kept[0]]), int(steps[kept[-1]])})
    figure.ruler("x").ticks(ends, [names[step] if names else f"{step:,}" for step in ends])
    figure.draw(figure.signal(steps[kept].tolist(), values[kept].tolist(), marker="*" if ascii else "braille").lines())
    plot = plotext.uncolorize(figure.build().string()).rstrip()
    return plot.translate(_ASCII_FRAME) if ascii else plot
