import math

import numpy as np
import pytest

from jaxinfra.track.charts import Curve, downsample, make_charts, moving_mean, page_data, run_curves
from jaxinfra.track.formatting import format_metric


def curve(values):
    return Curve(steps=np.arange(1, len(values) + 1), values=np.array(values, float))


def test_many_points_keep_their_spikes_and_gaps():
    values = 1.0 + np.arange(100_000) % 7 / 100
    values[61_803], values[27_182], values[31_415] = 50.0, -50.0, math.nan
    kept = downsample(values)
    assert len(kept) <= 4 * 600 + 1
    assert {0, 61_803, 27_182, 31_415, 99_999} <= set(kept.tolist())
    assert (np.diff(kept) > 0).all()


@pytest.mark.parametrize("count", [0, 1, 2, 1200, 1201])
def test_ends_are_kept(count):
    kept = downsample(np.full(count, math.nan)).tolist()
    assert kept[:1] == [0][:count] and kept[-1:] == [count - 1][: max(count, 0)]


def test_a_mean_lies_on_a_slope_and_ignores_what_is_not_finite():
    means, covered = moving_mean(curve([math.nan if step == 500 else step for step in range(1000)]))
    assert covered == 21 and means.steps[0] == 1 and means.steps[-1] == 1000
    inside = means.steps < 990
    assert means.values[inside] == pytest.approx(means.steps[inside] - 1, abs=0.5)
    assert means.values[-1] == pytest.approx(994), "at the end it covers the last values"


def test_one_spike_does_not_reach_beyond_its_neighbors():
    values = np.ones(1000)
    values[500] = 3e38
    means, covered = moving_mean(curve(values))
    assert set(means.values[abs(means.steps - 501) > covered]) == {1.0}


@pytest.mark.parametrize(
    ("value", "text"), [(1.6744503, "1.6745"), (10.65625, "10.6562"), (0.031251, "0.03125"), (1.00004e-5, "1e-05")]
)
def test_a_metric_is_rounded_once(value: float, text: str) -> None:
    """The page has what the tables print: a number of six digits would be rounded again where it is shown."""
    assert format_metric(value) == text
    rows = [{"step": 1, "loss": 9.0, "loss_mean": value}, {"step": 1, "eval/loss": value, "eval/bits_per_byte": value}]
    run = run_curves("a", rows, {"baselines": {"bits_per_byte": {"xz": value}}}, {})
    charts = make_charts([run])
    loss, bits = page_data([run], charts.drawn)["charts"]
    assert loss["isMetric"] and bits["isMetric"]
    assert [line["values"] for line in (*loss["lines"], *bits["lines"])] == [[float(text)]] * 3
    assert loss["levels"] == bits["levels"] == [["xz", float(text)]]


def test_lines_have_steps_tokens_and_time():
    rows = [{"step": step, "time_s": 9.0 + step, "loss": 1.0 / step} for step in range(1, 6)]
    run = run_curves("a", rows, {"derived": {"tokens a step": [64, ""]}}, {})
    charts = make_charts([run])
    data = page_data([run], charts.drawn)
    assert data["charts"][0]["lines"][0]["steps"] == [1, 2, 3, 4, 5]
    assert data["runs"] == [{"unitsPerStep": 64, "clock": ([1, 2, 3, 4, 5], [10.0, 11.0, 12.0, 13.0, 14.0])}]
