import math

import pytest

from jaxinfra.track.terminal_plot import plot_curve


def drawn(picture: str) -> list[str]:
    """The lines between the axes."""
    return [line.split("┤")[-1].rstrip("│") for line in picture.splitlines()[1:-2]]


def test_a_falling_line_goes_from_the_first_corner_to_the_last() -> None:
    picture = plot_curve([(step, 100.0 - step) for step in range(101)], width=40, height=8)
    lines = picture.splitlines()
    assert len(lines) == 8 and all(len(line) <= 40 for line in lines) and "\x1b" not in picture
    assert drawn(picture)[0].strip() and drawn(picture)[-1].strip()
    assert drawn(picture)[0][0] not in " \u2800" and drawn(picture)[-1][-1] not in " \u2800"
    assert lines[-1].split() == ["0", "100"]


@pytest.mark.parametrize("steps", [60, 50_000])
def test_one_spike_among_many_values_is_seen(steps: int) -> None:
    points = [(step, 9.0 if step == steps // 2 else 1.0) for step in range(steps)]
    assert drawn(plot_curve(points))[0].strip(" \u2800")


def test_values_that_are_not_finite_are_left_out() -> None:
    points = [(0, 1.0), (1, 2.0), (2, math.nan), (3, 3.0), (4, math.inf), (5, 4.0)]
    assert plot_curve(points) == plot_curve([point for point in points if math.isfinite(point[1])])


@pytest.mark.parametrize("values", [[], [math.nan], [math.inf, math.nan]])
def test_nothing_to_draw(values: list[float]) -> None:
    assert plot_curve(list(enumerate(values))) == "no values to draw"


@pytest.mark.parametrize("count", [1, 100])
def test_a_constant_runs_beside_its_label(count: int) -> None:
    (labeled,) = [line for line in plot_curve([(step, 2.5) for step in range(count)]).splitlines() if "2.5" in line]
    assert labeled.split("┤")[1].strip(" \u2800│")
