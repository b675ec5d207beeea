"""What is logged of the steps since the last log does not depend on restarts; see also tests/cli/test_resume.py."""

import json
import random

from jaxinfra.train.interval import Interval
from jaxinfra.train.trainer import Trainer
from tests.tiny_run import Tiny


def test_a_sum_goes_on_with_the_same_bits(tiny: Tiny) -> None:
    program, numbers = Trainer(tiny.loaded()).program, random.Random(0)
    losses = [numbers.uniform(0, 10) for _ in range(100)]

    def mean(*starts: list[float]) -> float:
        interval, record = Interval(program), {}
        for start in starts:
            interval.resume(record)
            for loss in start:
                interval.add(loss, skipped=False)
            interval.add(float("nan"), skipped=True)
            record = json.loads(json.dumps({"interval": interval.history}))
        interval.resume(record)
        values = interval.read(waited_s=0.0, peak_flops=1.0)
        assert values["skipped_steps"] == len(starts)
        return values["loss_mean"]

    assert {mean(losses[:cut], losses[cut:]) for cut in range(100)} == {mean(losses)}
