"""Runs of words as numbers: what is needed to see that a text repeats itself, or another one.

The numbers depend on the words alone, not on the process or the order of texts. N words have N - n + 1 runs of n.
"""

from collections.abc import Sequence

import numpy as np
import xxhash

STEP = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no word is lost from a run; 2**64 over the golden ratio


class _Codes(dict[str, int]):
    def __missing__(self, word: str) -> int:
        code = self[word] = xxhash.xxh3_64_intdigest(word.encode())
        return code


def word_codes(words: Sequence[str]) -> np.ndarray:
    """A number a word, uint64[N]; equal for equal words."""
    return np.fromiter(map(_Codes().__getitem__, words), np.uint64, len(words))


def run_codes(codes_N: np.ndarray, n: int) -> np.ndarray:
    """A number for every run of `n` words, uint64[max(N - n + 1, 0)]: a rolling hash (Karp and Rabin 1987).

    Args:
        codes_N: of the words.
        n: words of a run, at least 1.
    """
    runs = codes_N
    for extra in range(1, n):
        runs = runs[:-1] * STEP + codes_N[extra:]
    return runs
