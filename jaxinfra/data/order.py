"""Shuffles samples: the order is a pure function of (seed, step), without state or tables, in NumPy.

Read number g of a run reads sample `permutation_e(g mod n)` in epoch `e = g div n`; every epoch has its own permutation
of the n samples. So each sample is read exactly once an epoch, by any number of processes, from any step on, at the
same cost. With 5 samples and a global batch of 4, step 2 makes the reads 8 to 11, which are the indices 3 and 4 of
epoch 1, and 0 and 1 of epoch 2.

The permutation is an alternating Feistel network over the bits of n - 1 (Luby and Rackoff 1988; NIST SP 800-38G for
halves of unequal width), repeated until the result is below n (cycle walking: Black and Rogaway 2002, section 3). For
tiny n it sorts n hashes. It is good for shuffling, not for cryptography.

Shape suffixes: N samples, R rounds of the network, S indices of a tiny source, 1 a dimension of size one.
"""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from annotated_types import Ge, Le

from jaxinfra.config.limits import PositiveInt

_ROUNDS = 8  # even, so that the halves, which swap in each round, end with the widths that they began with
_MIN_BITS = 8  # with fewer, a network has too few different permutations
_TINY = 64  # up to this size hashes are sorted, because cycle walking would take too many repetitions
_MAX_BUCKETS = 2**14  # with up to 2**48 samples, `index * buckets` fits 63 bits
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio: the increment of SplitMix64
_STREAM = 0xD1342543DE82EF95  # an odd multiplier of good spectral quality (Steele and Vigna 2021, table 6)


@dataclass(frozen=True, kw_only=True)
class Curriculum:
    """Reads short samples first, if samples are sorted by length.

    In the first epochs, the samples are split into buckets of equal size. They are read one bucket after the other,
    shuffled within each; later epochs are shuffled as a whole. Every sample is still read once an epoch (Bengio et al.
    2009; by length, Pouransari et al. 2024, section 3.3).

    Attributes:
        buckets: number of buckets.
        epochs: number of epochs of each source that go from short to long.
    """

    buckets: Annotated[int, Ge(1), Le(_MAX_BUCKETS)] = 8
    epochs: PositiveInt = 1


def shuffled_ids(
    read_N: np.ndarray, *, size: int | np.ndarray, seed: int | np.ndarray, curriculum: Curriculum | None = None
) -> np.ndarray:
    """Returns the ids of the samples to read, int64[N], where every epoch of a source has its own order.

    Args:
        read_N: uint64[N] or int64[N], how many samples of the source were read before this one in the run.
        size: number of samples of the source, 1 to 2**48; one number, or int64[N].
        seed: seed of the source; any integer, or uint64[N] from `stream_seed`.
        curriculum: sorts the first epochs.
    """
    read_N, size_N = np.broadcast_arrays(read_N.astype(np.uint64), np.asarray(size, np.uint64))
    epoch_N, index_N = np.divmod(read_N, size_N)
    key_N = seeded_hash(seed, epoch_N)
    if curriculum is None or not (by_bucket_N := epoch_N < curriculum.epochs).any():
        return permute(index_N, size=size_N, key=key_N)
    # Bucket b has the indices from b * size // buckets on: of 10 samples in 4 buckets, from 0, 2, 5 and 7 on. Index 6
    # is in bucket (7 * 4 - 1) // 10 = 2. An epoch that is shuffled as a whole is one bucket.
    buckets, one = np.uint64(curriculum.buckets), np.uint64(1)
    bucket_N = np.where(by_bucket_N, ((index_N + one) * buckets - one) // size_N, np.uint64(0))
    start_N = bucket_N * size_N // buckets
    end_N = np.where(by_bucket_N, (bucket_N + one) * size_N // buckets, size_N)
    in_bucket_N = permute(index_N - start_N, size=end_N - start_N, key=key_N + _mix(bucket_N))
    return start_N.astype(np.int64) + in_bucket_N


def stream_seed(seed: int, stream: int) -> int:
    """Returns a seed, 0 to 2**64 - 1, for one of many independent orders of a run; stream 0 has the run's own seed."""
    return (seed + stream * _STREAM) % 2**64


def seeded_hash(seed: int | np.ndarray, number_N: np.ndarray) -> np.ndarray:
    """Returns a pseudorandom uint64 for each number; `seed` is any integer, or uint64[N]."""
    seed_N = seed if isinstance(seed, np.ndarray) else np.array([seed % 2**64], np.uint64)
    return _splitmix(_mix(seed_N), number_N)


def permute(index: np.ndarray, *, size: int | np.ndarray, key: np.ndarray) -> np.ndarray:
    """Permutes each index in range(size) by the permutation that its key selects; returns int64[N].

    Args:
        index: uint64[N] or int64[N], each in range(size).
        size: length of the range, 1 to 2**48; one number, or [N].
        key: uint64[N] or uint64[1].
    """
    index_N, size_N, key_N = np.broadcast_arrays(*(np.asarray(array, np.uint64) for array in (index, size, key)))
    is_tiny_N = size_N <= _TINY
    if not is_tiny_N.any():
        return _permute_by_network(index_N, size_N, key_N)
    out_N = np.empty(index_N.shape, np.int64)
    for chosen_N, method in ((is_tiny_N, _permute_by_rank), (~is_tiny_N, _permute_by_network)):
        out_N[chosen_N] = method(index_N[chosen_N], size_N[chosen_N], key_N[chosen_N])
    return out_N


def _permute_by_rank(index_N: np.ndarray, size_N: np.ndarray, key_N: np.ndarray) -> np.ndarray:
    """Returns the rank of each index's hash among the hashes of 0, 1, ... size - 1."""
    all_S = np.arange(size_N.max(), dtype=np.uint64)
    hash_NS = _splitmix(key_N[:, None], all_S)
    own_N1 = np.take_along_axis(hash_NS, index_N[:, None].astype(np.int64), axis=1)
    smaller_NS = (hash_NS < own_N1) & (all_S < size_N[:, None])  # no two are equal, as _mix is a bijection
    return smaller_NS.sum(axis=1)


def _permute_by_network(x_N: np.ndarray, size_N: np.ndarray, key_N: np.ndarray) -> np.ndarray:
    """Applies the network until each index is below its size (cycle walking).

    The network permutes range(512) if the size is 300. If it maps 7 to 400 and 400 to 12, the result for 7 is 12. No
    other index below 300 comes to 12, so that this permutes range(300).
    """
    # The exponent of frexp is the number of bits of size - 1.
    bits_N = np.maximum(_MIN_BITS, np.frexp((size_N - np.uint64(1)).astype(np.float64))[1]).astype(np.uint64)
    round_key_RN = _splitmix(key_N, np.arange(_ROUNDS)[:, None])
    x_N = _feistel(x_N, round_key_RN, bits_N)
    too_large = np.flatnonzero(x_N >= size_N)
    while too_large.size:
        x_N[too_large] = _feistel(x_N[too_large], round_key_RN[:, too_large], bits_N[too_large])
        too_large = too_large[x_N[too_large] >= size_N[too_large]]
    return x_N.astype(np.int64)


def _feistel(x_N: np.ndarray, round_key_RN: np.ndarray, bits_N: np.ndarray) -> np.ndarray:
    """Maps the integers below 2**bits one to one. Each round XORs one half with a hash of the other, and swaps them."""
    one, right_bits = np.uint64(1), bits_N >> np.uint64(1)  # of 9 bits, the left half has 5 and the right half 4
    left_mask, right_mask = (one << (bits_N - right_bits)) - one, (one << right_bits) - one
    left, right = x_N >> right_bits, x_N & right_mask
    for round_key_N in round_key_RN:  # swaps the halves, and so their masks
        left, right = right, left ^ (_mix(right ^ round_key_N) & left_mask)
        left_mask, right_mask = right_mask, left_mask
    return (left << right_bits) | right


def _splitmix(key: np.ndarray, number: np.ndarray) -> np.ndarray:
    """Returns an output of the generator SplitMix64 that starts from `key`; number 0 is its first."""
    return _mix(key + _GOLDEN * (number.astype(np.uint64) + np.uint64(1)))


def _mix(x: np.ndarray) -> np.ndarray:
    """Finalizer of SplitMix64 (Steele, Lea and Flood 2014): every input bit changes every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
