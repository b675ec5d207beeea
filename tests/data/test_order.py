"""The order in which samples of one source and of a mixture are read."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from jaxinfra.data.mixing import BLOCK, MixStage, MixtureSampler, stage_problems
from jaxinfra.data.order import Curriculum, permute, seeded_hash, shuffled_ids
from tests.refusals import problem


def sample_ids(step: int, *, global_batch: int, num_samples: int, seed: int) -> np.ndarray:
    return MixtureSampler([num_samples], global_batch=global_batch, seed=seed).sample_ids(step)[1]


def key_of(number: int) -> np.ndarray:
    return seeded_hash(number, np.zeros(1, np.uint64))


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


def test_small_ranges_are_permuted_uniformly():
    size, keys = 7, 14_000
    index = np.tile(np.arange(size), keys)
    key = np.repeat(seeded_hash(0, np.arange(keys, dtype=np.uint64)), size)
    table = permute(index, size=size, key=key).reshape(keys, size)
    counts = np.stack([np.bincount(column, minlength=size) for column in table.T])
    expected = keys / size
    chi2 = ((counts - expected) ** 2 / expected).sum()  # 36 degrees of freedom: 95 lies beyond 1e-6
    assert chi2 < 95
    assert len(np.unique(table, axis=0)) > 0.9 * 5040  # of 7! permutations


def test_seeds_and_epochs_have_their_own_order():
    def epoch(seed, number):
        return tuple(sample_ids(number, global_batch=100, num_samples=100, seed=seed).tolist())

    orders = {epoch(seed, number) for seed in (-1, 0, 1, 2**64 + 5) for number in range(3)}
    assert len(orders) == 12


def test_the_order_never_changes():
    """Runs resume from their step alone, so a changed order would silently repeat and skip data."""
    assert sample_ids(0, global_batch=8, num_samples=1000, seed=0).tolist() == [657, 965, 591, 644, 787, 123, 251, 374]
    assert sample_ids(10**9, global_batch=4, num_samples=2**40, seed=42).tolist() == [
        558393253839,
        575456855571,
        244483891281,
        552278399329,
    ]


def test_one_call_permutes_ranges_of_different_sizes():
    sizes = [1, 2, 5, 64, 65, 300, 2**13 + 1, 10]
    index = np.concatenate([np.arange(size) for size in sizes])
    size, key = np.repeat(sizes, sizes), np.repeat(seeded_hash(4, np.arange(len(sizes))), sizes)
    together = permute(index, size=size, key=key)
    for which, of in enumerate(sizes):
        alone = permute(np.arange(of), size=of, key=seeded_hash(4, np.array([which])))
        assert np.array_equal(together[size == of], alone)
        assert np.array_equal(np.sort(alone), np.arange(of))


@pytest.mark.parametrize(("samples", "buckets"), [(100, 8), (97, 5), (3, 8), (1, 1), (1000, 1)])
def test_a_curriculum_reads_buckets_in_order_and_each_sample_once(samples, buckets):
    curriculum = Curriculum(buckets=buckets, epochs=2)
    ids = shuffled_ids(np.arange(3 * samples), size=samples, seed=6, curriculum=curriculum).reshape(3, samples)
    assert np.array_equal(np.sort(ids, axis=1), np.tile(np.arange(samples), (3, 1)))
    bounds = [samples * bucket // buckets for bucket in range(buckets + 1)]
    for start, end in zip(bounds, bounds[1:], strict=False):
        assert np.array_equal(np.sort(ids[:2, start:end], axis=1), np.tile(np.arange(start, end), (2, 1)))
    plain = shuffled_ids(np.arange(3 * samples), size=samples, seed=6).reshape(3, samples)
    assert np.array_equal(ids[2], plain[2])
    if samples > 50:
        assert not np.array_equal(ids[0], ids[1])
        assert not np.array_equal(ids[0], np.arange(samples))


def test_buckets_of_a_curriculum_are_shuffled_differently():
    ids = shuffled_ids(np.arange(400), size=400, seed=6, curriculum=Curriculum(buckets=4)).reshape(4, 100)
    assert len({tuple(row) for row in (ids - 100 * np.arange(4)[:, None]).tolist()}) == 4


@pytest.mark.parametrize("wrong", [{"buckets": 0}, {"buckets": 2**14 + 1}, {"epochs": 0}])
def test_a_wrong_curriculum_is_refused(wrong):
    (field,) = wrong
    problem(Curriculum(**wrong), f"{field}={wrong[field]}: use {field}=")


@pytest.mark.parametrize(
    "arguments",
    [
        {"step": -1, "global_batch": 1, "num_samples": 1},
        {"step": 0, "global_batch": 0, "num_samples": 1},
        {"step": 0, "global_batch": 1, "num_samples": 0},
        {"step": 0, "global_batch": 1, "num_samples": 2**48 + 1},
        {"step": 2**62, "global_batch": 4, "num_samples": 1},
    ],
)
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=r"step|size"):
        sample_ids(**arguments, seed=0)


def read(sampler: MixtureSampler, steps: int, first: int = 0) -> np.ndarray:
    """Returns sources and samples of consecutive steps, [2, N]."""
    return np.concatenate([np.stack(sampler.sample_ids(step)) for step in range(first, first + steps)], axis=1)


def random_mixture(rng: np.random.Generator, steps: int) -> tuple[list[int], list[MixStage], int]:
    """Returns lengths, stages and a global batch, with tiny and unused sources and late stages."""
    sources = int(rng.integers(1, 9))
    lengths = [int(n) for n in rng.choice([1, 2, 7, 100, 641, 5000], sources)]
    starts = [0, *sorted(rng.choice(np.arange(1, steps), int(rng.integers(0, 4)), replace=False).tolist())]
    stages = []
    for start in starts:
        weights = rng.random(sources) ** 4 * (rng.random(sources) < 0.8)
        weights[rng.integers(sources)] += 0.01
        stages.append(MixStage(start_step=start, weights=tuple(weights.tolist())))
    return lengths, stages, int(rng.choice([1, 3, 24, 64, 100, 640]))


@pytest.mark.parametrize("seed", range(20))
def test_every_source_is_read_in_whole_epochs(seed):
    rng = np.random.default_rng(seed)
    lengths, stages, global_batch = random_mixture(rng, steps=60)
    curriculum = Curriculum(buckets=int(rng.integers(1, 9))) if seed % 2 else None
    sampler = MixtureSampler(lengths, stages, global_batch=global_batch, seed=seed, curriculum=curriculum)
    source_N, sample_N = read(sampler, 60)
    for source, length in enumerate(lengths):
        own = sample_N[source_N == source]
        for start in range(0, len(own), length):
            epoch = own[start : start + length]
            assert len(np.unique(epoch)) == len(epoch), "a sample comes twice in an epoch"
            assert epoch.min() >= 0
            assert epoch.max() < length
    assert np.bincount(source_N, minlength=len(lengths)).tolist() == sampler.counts(60)


@pytest.mark.parametrize("seed", range(20))
def test_shares_are_exact_to_the_stated_bound(seed):
    steps = 80
    lengths, stages, global_batch = random_mixture(np.random.default_rng(seed), steps)
    sampler = MixtureSampler(lengths, stages, global_batch=global_batch, seed=seed)
    source_N, _ = read(sampler, steps)
    at_step = np.searchsorted([stage.start_step for stage in stages], np.arange(len(source_N)) // global_batch, "right")
    share_stages = np.array([np.array(stage.weights) / sum(stage.weights) for stage in stages])
    due_NS = np.cumsum(share_stages[at_step - 1], axis=0)
    read_NS = np.cumsum(source_N[:, None] == np.arange(len(lengths)), axis=0)
    error_N = np.abs(read_NS - due_NS).max(axis=1)
    assert (error_N < 2 * at_step + BLOCK / 4).all()
    first_stage = (stages[1].start_step if len(stages) > 1 else steps) * global_batch
    assert (error_N[:first_stage][BLOCK - 1 :: BLOCK] < 2).all()


def test_shares_hold_for_thousands_of_sources_and_for_rare_ones():
    weights = tuple(1 / (i + 1) ** 2 for i in range(3000))
    sampler = MixtureSampler([10] * 3000, [MixStage(weights=weights)], global_batch=64, seed=0)
    for step in (1, 77, 10**5, 10**9):
        off = np.array(sampler.counts(step), float) - 64.0 * step * np.array(weights) / sum(weights)
        assert np.abs(off).max() < 2


def test_a_source_of_weight_0_pauses_and_continues_where_it_was():
    stages = [MixStage(weights=(1, 1)), MixStage(start_step=5, weights=(1, 0)), MixStage(start_step=9, weights=(0, 1))]
    sampler = MixtureSampler([40, 1000], stages, global_batch=10, seed=1)
    assert set(read(sampler, 4, first=5)[0]) == {0}
    assert set(read(sampler, 4, first=9)[0]) == {1}
    assert sampler.counts(5) == [25, 25]
    assert sampler.counts(9) == [65, 25]
    source_N, sample_N = read(sampler, 100)
    own = sample_N[source_N == 1]
    single = MixtureSampler([1, 1000], [MixStage(weights=(0, 1))], global_batch=9, seed=1)
    alone = np.concatenate([single.sample_ids(step)[1] for step in range(90)])
    assert np.array_equal(own[:810], alone)


def test_the_order_of_a_mixture_does_not_depend_on_the_batch_size():
    def order(global_batch: int) -> np.ndarray:
        sampler = MixtureSampler([50, 7], [MixStage(weights=(2, 1))], global_batch=global_batch, seed=3)
        return read(sampler, 960 // global_batch)

    assert np.array_equal(order(4), order(96))


def test_a_mixture_of_one_source_has_the_order_of_the_source():
    sampler = MixtureSampler([97], global_batch=10, seed=5)
    for step in (0, 9, 10**9):
        alone = shuffled_ids(np.arange(10 * step, 10 * step + 10), size=97, seed=5)
        assert np.array_equal(sampler.sample_ids(step)[1], alone)


def test_another_source_does_not_reshuffle_the_others():
    def order(lengths: Sequence[int]) -> np.ndarray:
        source_N, sample_N = read(MixtureSampler(lengths, global_batch=10, seed=5), 40)
        return sample_N[source_N == 1][:100]

    assert np.array_equal(order([60, 80]), order([60, 80, 50]))


def test_without_stages_all_sources_finish_their_epochs_together():
    assert MixtureSampler([300, 147, 1], global_batch=448, seed=0).counts(3) == [900, 441, 3]


def test_decimal_weights_are_exact():
    tenths = MixtureSampler([9, 9], [MixStage(weights=(0.1, 0.9))], global_batch=10, seed=0)
    assert tenths.counts(10**17) == [10**17, 9 * 10**17]


def test_each_row_of_a_batch_reads_every_source():
    """Row i of every batch, which one process reads, has its share of every source."""
    sampler = MixtureSampler([1000, 1000], [MixStage(weights=(1, 1))], global_batch=64, seed=0)
    first = np.array([sampler.sample_ids(step)[0] for step in range(200)])
    assert (np.abs(first.mean(axis=0) - 0.5) < 0.2).all()


def test_the_order_of_a_mixture_never_changes():
    """Runs resume from their step alone, so a changed order would silently repeat and skip data."""
    stages = [MixStage(weights=(0.7, 0.2, 0.1)), MixStage(start_step=1000, weights=(0.1, 0.2, 0.7))]
    sampler = MixtureSampler([1000, 10**6, 3], stages, global_batch=8, seed=42, curriculum=Curriculum(buckets=4))
    assert [array.tolist() for array in sampler.sample_ids(3)] == [
        [1, 0, 0, 1, 1, 0, 0, 1],
        [248032, 73, 178, 14891, 5765, 137, 1, 86855],
    ]
    assert [array.tolist() for array in sampler.sample_ids(10**6)] == [
        [2, 2, 2, 2, 2, 2, 1, 2],
        [0, 2, 0, 1, 0, 1, 606215, 2],
    ]


@dataclass(frozen=True, kw_only=True)
class Owner:
    sources: int
    stages: tuple[MixStage, ...] = field(default=())

    def problems(self):
        yield from stage_problems(self.stages, num_sources=self.sources)


@pytest.mark.parametrize(
    ("sources", "stages", "named"),
    [
        (1, [(0, (-1.0,))], "stages.0.weights=(-1.0,):"),
        (2, [(0, (0.0, 0.0))], "stages.0.weights=(0.0, 0.0):"),
        (1, [(0, (float("inf"),))], "stages.0.weights=(inf,):"),
        (1, [(-1, (1.0,))], "stages.0.start_step=-1: use stages.0.start_step=0"),
        (2, [(0, (1.0,))], "stages.0.weights=(1.0,): 2"),
        (1, [(3, (1.0,))], "stages.0.start_step=3:"),
        (1, [(0, (1.0,)), (5, (2.0,)), (5, (1.0,))], "stages.2.start_step=5:"),
    ],
)
def test_wrong_stages_are_refused(sources, stages, named):
    made = tuple(MixStage(start_step=start, weights=weights) for start, weights in stages)
    problem(Owner(sources=sources, stages=made), named)
    with pytest.raises(ValueError, match="weights|start_step"):
        MixtureSampler([5] * sources, made, global_batch=1, seed=0)
