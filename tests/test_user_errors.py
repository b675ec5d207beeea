"""A mistake in a class of a config file is one line with its file and line, or with what the class must return."""

from pathlib import Path

import pytest

from tests.refusals import refused
from tests.tiny_run import Tiny
from tests.tiny_run import tiny as tiny
from tests.tiny_run import tiny_data as tiny_data

HEAD = """\
from dataclasses import dataclass
from jaxinfra import ArrayData, LRSchedule, Optimizer, TrackConfig, TrackerConfig

@dataclass(frozen=True, kw_only=True)
class Mine({base}):
    modality = "token"
    def {method}(self, *args):
        {body}

"""
CASES = [
    ("Optimizer", "transform", "return self.b3", "optimizer=AdamW()", "optimizer=Mine()", "tiny.py:8: fix Mine,"),
    ("Optimizer", "transform", "pass", "optimizer=AdamW()", "optimizer=Mine()", "Mine.transform: NoneType; return an"),
    (
        "LRSchedule",
        "multiplier",
        "1 / 0",
        "schedule=Cosine(warmup_steps=2)",
        "schedule=Mine()",
        "tiny.py:8: fix Mine,",
    ),
    ("TrackerConfig", "make_tracker", "1 / 0", "console=", "trackers=(Mine(),), console=", "tiny.py:8: fix Mine,"),
    ("TrackerConfig", "make_tracker", "pass", "console=", "trackers=(Mine(),), console=", "NoneType; return Tracker"),
    ("ArrayData", "arrays", "1 / 0", "data=TokenData(", "data=Mine() or dict(", "tiny.py:8: fix Mine,"),
]


@pytest.mark.parametrize(("base", "method", "body", "old", "new", "message"), CASES)
def test_a_mistake_is_shown_with_its_line(
    tiny: Tiny, base: str, method: str, body: str, old: str, new: str, message: str
) -> None:
    text = tiny.config.read_text()
    assert text.count(old) == 1
    head = HEAD.format(base=base, method=method, body=body)
    tiny.config.write_text(head + text.replace(old, new))
    refused(tiny.launch("train.steps=3"), message)
    assert not Path(tiny.directory() / "checkpoints" / "3").exists()
