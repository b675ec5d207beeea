"""Texts as numbers: what is needed to see that a text repeats itself, or another one.

The numbers depend on what they are of alone, not on the process or the order. N words have N - n + 1 runs of n.
"""

from collections.abc import Sequence

import numpy as np
import xxhash

STEP = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no word is lost from a run; 2**64 over the golden ratio


def digest_of_bytes(content: bytes | memoryview) -> np.ndarray:
    """The 128 bits of XXH3, uint64[2]."""
    return np.frombuffer(xxhash.xxh3_128_digest(content), ">u8").astype(np.uint64)


def word_codes(words: Sequence[str]) -> np.ndarray:
    """A number a word, uint64[N]; equal for equal words."""
    codes = {word: xxhash.xxh3_64_intdigest(word.encode()) for word in set(words)}
    return np.fromiter(map(codes.__getitem__, words), np.uint64, len(words))


def run_codes(codes_N: np.ndarray, n: int) -> np.ndarray:
    """A number for every run of `n` words, uint64[max(N - n + 1, 0)]: a rolling hash (Karp and Rabin 1987)."""
    runs = codes_N
    for extra in range(1, n):
        runs = runs[:-1] * STEP + codes_N[extra:]
    return runs
