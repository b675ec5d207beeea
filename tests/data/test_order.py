import warnings

import numpy as np
import pytest

from jaxinfra.config import validate
from jaxinfra.data.order import Curriculum, epoch_keys, permute, reshuffled, sample_ids
from jaxinfra.errors import ConfigError


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


def test_a_far_step_is_read_like_any_other():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # integer overflow of scalars would warn
        ids = sample_ids(10**9, global_batch=4096, windows=10**12, seed=7)
    assert len(np.unique(ids)) == 4096


def test_indices_of_ranges_of_any_size_go_through_one_call():
    sizes = [1, 2, 5, 64, 65, 300, 2**13 + 1, 10]
    index = np.concatenate([np.arange(size) for size in sizes])
    size, key = np.repeat(sizes, sizes), np.repeat(epoch_keys(4, np.arange(len(sizes))), sizes)
    together = permute(index, size=size, key=key)
    for which, of in enumerate(sizes):
        alone = permute(np.arange(of), size=of, key=epoch_keys(4, np.array([which])))
        assert np.array_equal(together[size == of], alone)
        assert np.array_equal(np.sort(alone), np.arange(of))


@pytest.mark.parametrize(("samples", "buckets"), [(100, 8), (97, 5), (3, 8), (1, 1), (1000, 1)])
def test_a_curriculum_goes_from_short_to_long_and_reads_each_sample_once(samples, buckets):
    curriculum = Curriculum(buckets=buckets, epochs=2)
    ids = reshuffled(np.arange(3 * samples), size=samples, seed=6, curriculum=curriculum).reshape(3, samples)
    assert np.array_equal(np.sort(ids, axis=1), np.tile(np.arange(samples), (3, 1)))
    bounds = [samples * bucket // buckets for bucket in range(buckets + 1)]
    for start, end in zip(bounds, bounds[1:], strict=False):
        assert np.array_equal(np.sort(ids[:2, start:end], axis=1), np.tile(np.arange(start, end), (2, 1)))
    plain = reshuffled(np.arange(3 * samples), size=samples, seed=6).reshape(3, samples)
    assert np.array_equal(ids[2], plain[2])
    if samples > 50:
        assert not np.array_equal(ids[0], ids[1])
        assert not np.array_equal(ids[0], np.arange(samples))


def test_ranges_of_a_curriculum_are_shuffled_each_in_its_way():
    ids = reshuffled(np.arange(400), size=400, seed=6, curriculum=Curriculum(buckets=4)).reshape(4, 100)
    assert len({tuple(row) for row in (ids - 100 * np.arange(4)[:, None]).tolist()}) == 4


@pytest.mark.parametrize("wrong", [{"buckets": 0}, {"buckets": 2**14 + 1}, {"buckets": 4, "epochs": 0}])
def test_a_wrong_curriculum_is_one_line(wrong):
    with pytest.raises(ConfigError, match=r"^(buckets|epochs)=\d+: expected .*; use (buckets=8|epochs=1)"):
        validate(Curriculum(**wrong))


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
