"""The order in which samples are read: a pure function of (seed, step), in NumPy, with no state and no table.

Reading epoch after epoch, the sample with running number g is sample `permutation_e(g mod n)` of epoch
`e = g div n`, and every epoch has its own permutation of the n samples. So each sample is read exactly once
an epoch, by any number of processes, from any step on, and the last epoch costs what the first costs.

The permutation is an alternating Feistel network over the bits of n - 1 (Luby and Rackoff 1988; NIST SP 800-38G
for halves of unequal width), walked until it lands below n (cycle walking: Black and Rogaway 2002, section 3);
for tiny n it is the order of n hashes. It is made for shuffling, not for secrets.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

import numpy as np
from annotated_types import Ge, Le

from jaxinfra.config.limits import Count

_ROUNDS = 8  # even: the halves have their own widths again at the end
_MIN_BITS = 8  # with fewer, a network has too few different permutations
_TINY = 64  # up to here the walk would be long, and hashes are sorted instead
_MAX_BUCKETS = 2**14
_TOGETHER = 1024  # samples that are worked out at once; arrays of a few thousand stay in the cache of a core
MAX_SIZE = 2**48  # samples of a source that can be told apart
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio: the increment of SplitMix64
_STREAM = 0xD1342543DE82EF95  # an odd multiplier of good spectral quality (Steele and Vigna 2021, table 6)


@dataclass(frozen=True, kw_only=True)
class Curriculum:
    """Short samples first, where samples are numbered by rising length.

    While it lasts, an epoch goes through `buckets` ranges of equally many samples, from the first to the last, and is
    shuffled inside each of them; afterwards it is shuffled whole. Every sample is read once an epoch all the same
    (Bengio et al. 2009; by length, Pouransari et al. 2024, section 3.3).

    Attributes:
        buckets: how many ranges.
        epochs: of each source, how many go from short to long.
    """

    buckets: Annotated[int, Ge(1), Le(_MAX_BUCKETS)] = 8
    epochs: Count = 1


def sample_ids(
    step: int, *, global_batch: int, windows: int, seed: int, curriculum: Curriculum | None = None
) -> np.ndarray:
    """The windows that make up the global batch of a step, int64[global_batch], not to be written to.

    A batch may run over the end of an epoch, and may hold several epochs of a small data set. Steps that follow one
    another are worked out together: of one by itself, NumPy's calls would cost more than its numbers. Steps count from
    0, `global_batch` rows over all processes, `windows` from 1 to 2**48; beyond is a ValueError. The seed is any
    integer.
    """
    if step < 0 or global_batch < 1 or not 1 <= windows <= MAX_SIZE:
        raise ValueError(
            f"step={step}, global_batch={global_batch}, windows={windows}: "
            "expected step >= 0, global_batch >= 1 and 1 to 2**48 windows"
        )
    steps = steps_together(global_batch)
    if (step + steps) * global_batch >= 2**63:
        raise ValueError(f"step={step}: its samples cannot be numbered in 63 bits")
    return _steps(step // steps * steps, steps, global_batch, windows, seed, curriculum)[step % steps]


def steps_together(global_batch: int) -> int:
    """How many steps are worked out together."""
    return max(1, _TOGETHER // global_batch)


@lru_cache(maxsize=16)
def _steps(
    first: int, steps: int, global_batch: int, windows: int, seed: int, curriculum: Curriculum | None
) -> np.ndarray:
    """The windows of some steps: int64[steps, global_batch]."""
    running = np.arange(first * global_batch, (first + steps) * global_batch, dtype=np.uint64)
    ids = shuffled_ids(running, size=windows, seed=seed, curriculum=curriculum).reshape(steps, global_batch)
    ids.flags.writeable = False
    return ids


def shuffled_ids(
    number: np.ndarray, *, size: int | np.ndarray, seed: int | np.ndarray, curriculum: Curriculum | None = None
) -> np.ndarray:
    """The samples that are read when sources are read epoch after epoch, every epoch in its own order, int64[N].

    Args:
        number: uint64[N] or int64[N], which sample of its source since the start of the run, from 0.
        size: samples of the source, 1 to 2**48, else ValueError; one number, or int64[N].
        seed: of the source; any integer, or uint64[N] of `stream_seed`.
        curriculum: how the first epochs go.
    """
    number, size = np.broadcast_arrays(number.astype(np.uint64), np.asarray(size, np.uint64))
    epoch, index = np.divmod(number, size)
    key = epoch_keys(seed, epoch)
    if curriculum is None or not (early := epoch < curriculum.epochs).any():
        return permute(index, size=size, key=key)
    ranges, one = np.uint64(curriculum.buckets), np.uint64(1)
    bucket = np.where(early, ((index + one) * ranges - one) // size, np.uint64(0))
    start = bucket * size // ranges
    end = np.where(early, (bucket + one) * size // ranges, size)
    inside = permute(index - start, size=end - start, key=key + _mix(bucket))
    return inside + start.astype(np.int64)


def stream_seed(seed: int, stream: int) -> int:
    """The seed of one of many independent orders of a run, 0 to 2**64 - 1; that of stream 0 is the run's."""
    return (seed + stream * _STREAM) % 2**64


def epoch_keys(seed: int | np.ndarray, epoch: np.ndarray) -> np.ndarray:
    """The permutation key of each epoch, uint64 like `epoch`; `seed` is any integer, or uint64 like `epoch`."""
    base = _mix(seed if isinstance(seed, np.ndarray) else np.array([seed % 2**64], np.uint64))
    return _mix(base + _GOLDEN * (epoch.astype(np.uint64) + np.uint64(1)))


def permute(index: np.ndarray, *, size: int | np.ndarray, key: np.ndarray) -> np.ndarray:
    """Where each index goes under the permutation of range(size) that its key selects, int64[N].

    Args:
        index: uint64[N] or int64[N], each in range(size), else ValueError.
        size: length of the range, 1 to 2**48, else ValueError; one number, or [N].
        key: uint64[N] or uint64[1].
    """
    x_N, size_N, key_N = np.broadcast_arrays(*(np.asarray(each, np.uint64) for each in (index, size, key)))
    if not x_N.size:
        return np.zeros(0, np.int64)
    if (wrong := (size_N < 1) | (size_N > MAX_SIZE)).any():
        raise ValueError(f"size={int(size_N[wrong][0])}: expected 1 to 2**48")
    if (wrong := x_N >= size_N).any():
        raise ValueError(f"index {int(x_N[wrong].max())} is not below size={int(size_N[wrong][0])}")
    tiny_N = size_N <= _TINY
    if not tiny_N.any():
        return _walk(x_N, size_N, key_N)
    out_N = np.empty(x_N.shape, np.int64)
    for some, way in ((tiny_N, _rank), (~tiny_N, _walk)):
        out_N[some] = way(x_N[some], size_N[some], key_N[some])
    return out_N


def _rank(x_N: np.ndarray, size_N: np.ndarray, key_N: np.ndarray) -> np.ndarray:
    """The place of each index in the order of the hashes of 0, 1, ... size - 1."""
    every_S = np.arange(size_N.max(), dtype=np.uint64)
    hash_NS = _mix(key_N[:, None] + _GOLDEN * (every_S + np.uint64(1)))
    own_N1 = np.take_along_axis(hash_NS, x_N[:, None].astype(np.int64), axis=1)
    before_NS = (hash_NS < own_N1) & (every_S < size_N[:, None])  # the hashes of a key differ: _mix is a bijection
    return before_NS.sum(axis=1)


def _walk(x_N: np.ndarray, size_N: np.ndarray, key_N: np.ndarray) -> np.ndarray:
    """Through the network until each index is below its size again."""
    bits_N = np.maximum(_MIN_BITS, np.frexp((size_N - np.uint64(1)).astype(np.float64))[1]).astype(np.uint64)
    round_RN = _mix(key_N + _GOLDEN * np.arange(1, _ROUNDS + 1, dtype=np.uint64)[:, None])
    x_N = _feistel(x_N, round_RN, bits_N)
    outside = np.flatnonzero(x_N >= size_N)
    while outside.size:
        x_N[outside] = _feistel(x_N[outside], round_RN[:, outside], bits_N[outside])
        outside = outside[x_N[outside] >= size_N[outside]]
    return x_N.astype(np.int64)


def _feistel(x_N: np.ndarray, round_RN: np.ndarray, bits_N: np.ndarray) -> np.ndarray:
    """A keyed bijection of the integers below 2**bits; the left half has the odd bit."""
    one, right_bits = np.uint64(1), bits_N >> np.uint64(1)
    mask, other = (one << (bits_N - right_bits)) - one, (one << right_bits) - one
    left, right = x_N >> right_bits, x_N & other
    for round_N in round_RN:
        left, right = right, left ^ (_mix(right ^ round_N) & mask)
        mask, other = other, mask
    return (left << right_bits) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every input bit moves every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
