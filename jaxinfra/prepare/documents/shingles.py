"""Hashes of texts, words and word n-grams, to find texts that repeat themselves or each other.

A hash depends only on what is hashed, not on the process. Shape suffix: N words of a text.
"""

from collections.abc import Sequence

import numpy as np
import xxhash

# 2**64 / golden ratio. It is odd, so multiplication modulo 2**64 is invertible and keeps all bits of earlier words.
HASH_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def hash128(content: bytes | memoryview) -> np.ndarray:
    """Returns the XXH3 128-bit hash, uint64[2]."""
    return np.frombuffer(xxhash.xxh3_128_digest(content), ">u8").astype(np.uint64)


def word_hashes(words: Sequence[str]) -> np.ndarray:
    """Hashes each word: uint64[N]."""
    hashes = {word: xxhash.xxh3_64_intdigest(word.encode()) for word in set(words)}
    return np.fromiter(map(hashes.__getitem__, words), np.uint64, len(words))


def ngram_hashes(words_N: np.ndarray, n: int) -> np.ndarray:
    """Hashes each n-gram of hashed words: uint64[max(N - n + 1, 0)], by a rolling hash (Karp and Rabin 1987)."""
    hashes = words_N
    for offset in range(1, n):
        hashes = hashes[:-1] * HASH_MULTIPLIER + words_N[offset:]
    return hashes
