"""Saves leak neither memory nor files nor threads."""

import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from statistics import median

import pytest

from tests.conftest import ROOT

SAVES, FIRST = 200, 60  # the first ones fill pools and caches
RESOLUTION_BYTES = 4096
"""The same code grows by 0.2 to 2.6 kB a save, as the fragments of the heap happen to lie."""


def slope(values: list[float]) -> tuple[float, float, float]:
    """The Theil-Sen estimate of the slope with its 95% confidence interval (Sen 1968)."""
    count = len(values)
    slopes = sorted((values[j] - values[i]) / (j - i) for i, j in combinations(range(count), 2))
    spread = 1.96 * (count * (count - 1) * (2 * count + 5) / 18) ** 0.5
    low, high = (len(slopes) - spread) / 2, (len(slopes) + spread) / 2
    return slopes[int(low)], median(slopes), slopes[min(int(high), len(slopes) - 1)]


@pytest.mark.slow(20)
def test_the_memory_of_two_hundred_saves(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tests.checkpoint.memory_child", str(tmp_path), str(SAVES)]
    child = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = json.loads(child.stdout.splitlines()[-1])[FIRST:]
    low, estimate, _ = slope([row["rss_bytes"] for row in rows])
    assert low < RESOLUTION_BYTES, f"a save leaks {estimate:,.0f} bytes"
    for name in "open_files", "threads":
        low, _, high = slope([row[name] for row in rows])
        assert low <= 0 <= high, name
