import time
import warnings

import numpy as np
import pytest

from jaxinfra.data.order import epoch_keys, permute, sample_ids


def key_of(number: int) -> np.ndarray:
    return epoch_keys(number, np.zeros(1, np.uint64))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 16, 17, 255, 256, 257, 1000, 65_536, 65_537, 200_003])
def test_permute_is_a_bijection(size):
    for seed in (0, 1, 2**63):
        assert np.array_equal(np.sort(permute(np.arange(size), size=size, key=key_of(seed))), np.arange(size))


def test_permute_stays_in_a_huge_range_and_is_injective_there():
    size = 2**48 - 59
    index = np.concatenate([np.arange(100_000), size - 1 - np.arange(100_000)])
    out = permute(index, size=size, key=key_of(3))
    assert out.min() >= 0
    assert out.max() < size
    assert len(np.unique(out)) == len(index)


def test_every_position_of_a_small_range_is_reached_about_equally_often():
    size, keys = 7, 14_000
    index = np.tile(np.arange(size), keys)
    key = np.repeat(epoch_keys(0, np.arange(keys, dtype=np.uint64)), size)
    table = permute(index, size=size, key=key).reshape(keys, size)
    counts = np.stack([np.bincount(column, minlength=size) for column in table.T])
    expected = keys / size
    chi2 = ((counts - expected) ** 2 / expected).sum()  # 36 degrees of freedom: 95 lies beyond 1e-6
    assert chi2 < 95
    assert len(np.unique(table, axis=0)) > 0.9 * 5040  # of 7! permutations


def test_neighbours_are_torn_apart():
    size = 100_000
    out = permute(np.arange(size), size=size, key=key_of(5))
    assert abs(np.corrcoef(np.arange(size), out)[0, 1]) < 0.02
    assert abs(np.abs(np.diff(out)).mean() / (size / 3) - 1) < 0.02  # two independent uniforms differ by n/3


@pytest.mark.parametrize(("windows", "global_batch"), [(10, 4), (10, 10), (10, 25), (1, 3), (97, 8)])
def test_each_window_is_read_once_an_epoch_whatever_the_batch(windows, global_batch):
    epochs = 4
    steps = -(-windows * epochs // global_batch)
    ids = np.concatenate([sample_ids(s, global_batch=global_batch, windows=windows, seed=1) for s in range(steps)])
    for epoch in range(epochs):
        one = ids[epoch * windows : (epoch + 1) * windows]
        assert np.array_equal(np.sort(one), np.arange(windows))


def test_the_order_does_not_depend_on_the_batch_size():
    small = np.concatenate([sample_ids(s, global_batch=4, windows=50, seed=9) for s in range(30)])
    large = np.concatenate([sample_ids(s, global_batch=24, windows=50, seed=9) for s in range(5)])
    assert np.array_equal(small, large)


def test_seeds_and_epochs_have_their_own_order():
    def epoch(seed, number):
        return tuple(sample_ids(number, global_batch=100, windows=100, seed=seed).tolist())

    orders = {epoch(seed, number) for seed in (-1, 0, 1, 2**64 + 5) for number in range(3)}
    assert len(orders) == 12


def test_the_order_never_changes():
    """Runs go on from their step alone, so a changed order would repeat and skip data silently."""
    assert sample_ids(0, global_batch=8, windows=1000, seed=0).tolist() == [
        657,
        965,
        591,
        644,
        787,
        123,
        251,
        374,
    ]
    assert sample_ids(10**9, global_batch=4, windows=2**40, seed=42).tolist() == [
        558393253839,
        575456855571,
        244483891281,
        552278399329,
    ]


def test_a_far_step_costs_what_the_first_costs():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # integer overflow of scalars would warn
        start_s = time.perf_counter()
        ids = sample_ids(10**9, global_batch=4096, windows=10**12, seed=7)
    assert time.perf_counter() - start_s < 0.5
    assert len(np.unique(ids)) == 4096


@pytest.mark.parametrize(
    "arguments",
    [
        {"step": -1, "global_batch": 1, "windows": 1},
        {"step": 0, "global_batch": 0, "windows": 1},
        {"step": 0, "global_batch": 1, "windows": 0},
        {"step": 0, "global_batch": 1, "windows": 2**48 + 1},
        {"step": 2**62, "global_batch": 4, "windows": 1},
    ],
)
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=r"step|size"):
        sample_ids(**arguments, seed=0)


def test_an_index_out_of_range_is_refused():
    with pytest.raises(ValueError, match="index 5 is not below size=5"):
        permute(np.arange(6), size=5, key=key_of(0))
