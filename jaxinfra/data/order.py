"""The order in which windows are read: a pure function of (seed, step), in NumPy, with no state and no table.

Reading epoch after epoch, the sample with running number g is window `permutation_e(g mod n)` of epoch
`e = g div n`, and every epoch has its own permutation of the n windows. So each window is read exactly once
an epoch, by any number of processes, from any step on, and the last epoch costs what the first costs.

The permutation is a balanced Feistel network over the smallest even number of bits that holds n (Luby and
Rackoff 1988), walked until it lands below n (cycle walking: Black and Rogaway 2002, section 3). It is made
for shuffling, not for secrets.
"""

import numpy as np

_ROUNDS = 8
_MIN_HALF_BITS = 4  # with fewer, a network has too few different permutations for tiny n
_MAX_SIZE = 2**48
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio: the increment of SplitMix64


def sample_ids(step: int, *, global_batch: int, windows: int, seed: int) -> np.ndarray:
    """The windows that make up the global batch of a step, int64[global_batch].

    A batch may run over the end of an epoch, and may hold several epochs of a small data set.

    Args:
        step: number of the step, from 0.
        global_batch: rows of the batch over all processes.
        windows: how many windows there are, 1 to 2**48.
        seed: any integer.

    Raises:
        ValueError: an argument is out of range.
    """
    if step < 0 or global_batch < 1 or not 1 <= windows <= _MAX_SIZE:
        raise ValueError(
            f"step={step}, global_batch={global_batch}, windows={windows}: "
            "expected step >= 0, global_batch >= 1 and 1 to 2**48 windows"
        )
    first = step * global_batch
    if first + global_batch >= 2**63:
        raise ValueError(f"step={step}: sample number {first} does not fit in 63 bits")
    running = np.arange(first, first + global_batch, dtype=np.uint64)
    epoch, index = np.divmod(running, np.uint64(windows))
    return permute(index, size=windows, key=epoch_keys(seed, epoch))


def epoch_keys(seed: int, epoch: np.ndarray) -> np.ndarray:
    """The permutation key of each epoch, uint64 like `epoch`."""
    base = _mix(np.array([seed % 2**64], np.uint64))
    return _mix(base + _GOLDEN * (epoch.astype(np.uint64) + np.uint64(1)))


def permute(index: np.ndarray, *, size: int, key: np.ndarray) -> np.ndarray:
    """Where each index goes under the permutation of range(size) that its key selects, int64[N].

    Args:
        index: uint64[N] or int64[N], each in range(size).
        size: length of the range, 1 to 2**48.
        key: uint64[N] or uint64[1].

    Raises:
        ValueError: `size` or an index is out of range.
    """
    if not 1 <= size <= _MAX_SIZE:
        raise ValueError(f"size={size}: expected 1 to 2**48")
    x_N = index.astype(np.uint64)
    if x_N.size and int(x_N.max()) >= size:
        raise ValueError(f"index {int(x_N.max())} is not below size={size}")
    key_N = np.broadcast_to(key.astype(np.uint64), x_N.shape)
    half_bits = max(_MIN_HALF_BITS, ((size - 1).bit_length() + 1) // 2)
    x_N = _feistel(x_N, key_N, half_bits)
    outside = np.flatnonzero(x_N >= size)
    while outside.size:
        x_N[outside] = _feistel(x_N[outside], key_N[outside], half_bits)
        outside = outside[x_N[outside] >= size]
    return x_N.astype(np.int64)


def _feistel(x_N: np.ndarray, key_N: np.ndarray, half_bits: int) -> np.ndarray:
    """A keyed bijection of the integers below 2**(2 * half_bits)."""
    shift, mask = np.uint64(half_bits), np.uint64(2**half_bits - 1)
    left, right = x_N >> shift, x_N & mask
    round_key = key_N
    for _ in range(_ROUNDS):
        round_key = round_key + _GOLDEN
        left, right = right, left ^ (_mix(right ^ _mix(round_key)) & mask)
    return (left << shift) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every input bit moves every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
