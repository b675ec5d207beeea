import math

import pytest

from jaxinfra.track.curve import curve


def dots(picture):
    """Returns the (column, row) of every raised dot."""
    bits = {
        0x01: (0, 0),
        0x02: (0, 1),
        0x04: (0, 2),
        0x40: (0, 3),
        0x08: (1, 0),
        0x10: (1, 1),
        0x20: (1, 2),
        0x80: (1, 3),
    }
    found = set()
    for row, line in enumerate(picture.splitlines()[:-1]):
        for column, character in enumerate(line.split("┤")[1]):
            pattern = ord(character) - 0x2800
            found |= {(2 * column + x, 4 * row + y) for bit, (x, y) in bits.items() if pattern & bit}
    return found


def test_golden_picture():
    picture = curve([4.0, 3.0, 2.0, 1.0], width=20, height=3, steps=(0, 300))
    assert picture == "\n".join(["4 ┤⠉⠒⠢⢤⣀⡀", "  ┤⠀⠀⠀⠀⠀⠉⠙⠒⠢⠤⢄⣀", "1 ┤⠀⠀⠀⠀⠀⠀⠀⠀⠀⠀⠀⠀⠉⠑⠲⠤⣄", "   0             300"])


def test_a_falling_line_falls_all_the_way_without_a_gap():
    found = dots(curve([100.0 - i for i in range(101)], width=40, height=8))
    columns = {x for x, _ in found}
    assert columns == set(range(max(columns) + 1)) and len(columns) == 2 * (40 - 3 - 2)
    assert (0, 0) in found and (max(columns), 31) in found
    tops = [min(y for x, y in found if x == column) for column in sorted(columns)]
    assert tops == sorted(tops)


def test_one_spike_among_many_values_is_seen():
    values = [1.0] * 50_000
    values[30_000] = 9.0
    assert any(y == 0 for _, y in dots(curve(values)))


def test_values_that_are_not_finite_leave_a_gap():
    found = {x for x, _ in dots(curve([1.0, 2.0, math.nan, 3.0, math.inf, 4.0], width=40, height=4))}
    middle = max(found) * 2 // 5
    assert middle not in found


@pytest.mark.parametrize("values", [[], [math.nan], [math.inf, math.nan]])
def test_nothing_to_draw(values):
    assert curve(values) == "no values to draw"


@pytest.mark.parametrize("values", [[2.5], [2.5] * 100])
def test_a_constant_runs_beside_its_one_label(values):
    lines = curve(values, height=5).splitlines()
    (labelled,) = [line for line in lines if line.startswith("2.5")]
    assert len(labelled) > len("2.5 ┤")


def test_too_small_is_refused():
    with pytest.raises(ValueError, match="20"):
        curve([1.0], width=10)
    assert all(len(line) <= 20 for line in curve([1e9, 2e9], width=20, height=2).splitlines())
