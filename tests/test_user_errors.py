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


OBJECTIVE = """\
from dataclasses import dataclass
from jaxinfra.objectives.causal_lm import CausalLM

@dataclass(frozen=True, kw_only=True)
class Mine(CausalLM):
    def {method}(self, *args):
        {body}

"""


@pytest.mark.parametrize(
    ("method", "body", "message"),
    [
        ("problems", "raise KeyError('gamma')", "tiny.py:7: KeyError gamma"),
        ("problems_with", "return args[0].missing", "tiny.py:7: AttributeError missing"),
        ("flops", "return 1 / 0", "tiny.py:7: ZeroDivisionError"),
        ("evaluation_metrics", "return 1 / 0", "tiny.py:7: ZeroDivisionError Mine"),
        ("evaluation_metrics", "return {'loss': 'low'}", "Mine ValueError 'low'"),
    ],
)
def test_a_mistake_in_any_method_is_one_line(tiny: Tiny, method: str, body: str, message: str) -> None:
    text = tiny.config.read_text()
    assert text.count("data=TokenData(") == 1
    head = OBJECTIVE.format(method=method, body=body)
    tiny.config.write_text(head + text.replace("data=TokenData(", "objective=Mine(), data=TokenData("))
    refused(tiny.launch("train.steps=3"), message)


UNLIKE = """\
import numpy as np
from dataclasses import dataclass
from jaxinfra import ArraySpec
from jaxinfra.data.in_memory import ArrayData

@dataclass(frozen=True, kw_only=True)
class Mine(ArrayData):
    modality = "token"
    seq_len: int = 16
    def arrays(self, split):
        return {{"inputs": np.zeros((40, {length}), np.int32), "targets": np.zeros((40, 16), np.{dtype})}}
    def batch_spec(self, *, validation):
        row = ArraySpec(shape=(16,), dtype="int32", axes=("sequence",))
        weights = {{"weights": ArraySpec()}} if validation else {{}}
        return {{"inputs": row, "targets": row}} | weights

"""


@pytest.mark.parametrize(
    ("length", "dtype", "message"),
    [(8, "int32", "Mine: inputs int32[8, 8] int32[8, 16]"), (16, "int64", "Mine: targets int64[8, 16] int32[8, 16]")],
)
def test_a_batch_unlike_its_spec_is_refused(tiny: Tiny, length: int, dtype: str, message: str) -> None:
    text = tiny.config.read_text()
    head = UNLIKE.format(length=length, dtype=dtype)
    tiny.config.write_text(head + text.replace("data=TokenData(", "data=Mine() or dict("))
    refused(tiny.launch("train.steps=3"), message)
