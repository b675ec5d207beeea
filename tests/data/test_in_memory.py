"""Data in memory: order, validation samples, and what is refused."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest

from jaxinfra.data.in_memory import ArrayData
from jaxinfra.errors import ConfigError
from tests.refusals import raises


@dataclass(frozen=True, kw_only=True)
class Squares(ArrayData):
    """Numbers and their squares, ten to train on."""

    factor: int = 1
    seed: int = 0

    def arrays(self, split: str) -> dict[str, np.ndarray]:
        numbers = np.arange(10 if split == "train" else 3, dtype=np.int32)
        return {"inputs": numbers, "labels": self.factor * numbers**2}


@dataclass(frozen=True, kw_only=True)
class Wrong(ArrayData):
    case: str

    def arrays(self, split: str) -> Any:
        return CASES[self.case][0]


CASES: dict[str, tuple[Any, str]] = {
    "no dict": (None, "NoneType dict"),
    "empty": ({}, "dict"),
    "list": ({"inputs": [1, 2]}, "inputs numpy.asarray"),
    "scalar": ({"inputs": np.array(1)}, "inputs [samples,"),
    "no sample": ({"inputs": np.zeros(0)}, "one or more"),
    "lengths": ({"inputs": np.zeros(3), "labels": np.zeros(4)}, "'inputs': 3 'labels': 4 same number"),
}


def test_an_epoch_reads_every_sample_once_in_an_order_of_the_seed() -> None:
    orders = []
    for seed in (0, 0, 1):
        dataset = Squares(seed=seed).open()
        ids = np.concatenate([dataset.sample_ids(step, 5) for step in range(2)])
        assert sorted(ids) == [*range(10)]
        assert (dataset.train.read(ids, weighted=False)["labels"] == ids**2).all()
        orders.append(ids.tolist())
    assert orders[0] == orders[1] != orders[2]


def test_validation_samples_have_weights_and_a_limit() -> None:
    data = Squares()
    assert data.batch_spec(validation=True).keys() == {"inputs", "labels", "weights"}
    assert data.batch_spec(validation=False).keys() == {"inputs", "labels"}
    samples = data.open().validation(2)
    assert len(samples) == 2
    assert samples.read(np.array([1]), weighted=True)["weights"] == [1]


def test_the_fingerprint_follows_the_values() -> None:
    data = Squares()
    assert data.open().fingerprint == Squares(seed=1).open().fingerprint
    assert data.open().fingerprint != replace(data, factor=2).open().fingerprint
    assert data.open().train_units == 10
    assert [*data.open().format_rows(np.array([3]), 0, 80)] == ["row 0: sample 3", "inputs 3", "labels 9"]


@pytest.mark.parametrize("case", CASES)
def test_arrays_that_are_no_samples_are_refused(case: str) -> None:
    with raises(ConfigError, "Wrong.arrays('train'):", CASES[case][1]):
        Wrong(case=case).batch_spec(validation=False)


@dataclass(frozen=True, kw_only=True)
class Tokens(ArrayData):
    modality: ClassVar[str] = "token"

    def arrays(self, split: str) -> dict[str, np.ndarray]:
        rows = np.arange(160, dtype=np.int32).reshape(10, 16) % 7
        return {"inputs": rows[:, :-1], "targets": rows[:, 1:]}


def test_tokens_have_a_length_and_a_weight_each() -> None:
    data = Tokens()
    assert (data.seq_len, data.units_per_sample, data.open().train_units) == (15, 15, 150)
    weights = data.open().validation().read(np.arange(2), weighted=True)["weights"]
    assert weights.shape == (2, *data.batch_spec(validation=True)["weights"].shape) == (2, 15)
