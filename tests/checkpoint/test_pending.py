"""Tests how much reads and writes of a checkpoint hold at once."""

from functools import partial
from typing import Any

from jaxinfra.checkpoint.pending import in_window


def test_requests_on_their_way_fit_in_the_window() -> None:
    """One that is larger than the window goes alone, and all come out in order."""
    pending, most, order = dict[int, int](), 0, list[int]()
    sizes = [40, 40, 40, 200, 10, 90, 100, 1]

    def start(number: int) -> Any:
        nonlocal most
        pending[number] = sizes[number]
        most = max(most, sum(pending.values()) if len(pending) > 1 else 0)
        return number

    for number in in_window(((partial(start, number), size) for number, size in enumerate(sizes)), 100):
        order.append(number)
        del pending[number]
    assert order == [*range(len(sizes))] and 80 <= most <= 100
