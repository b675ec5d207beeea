"""Deduplication of documents, exact by hash, or near by MinHash over word n-grams.

A signature is a function of one text, and the result is a function of the signatures in order, so threads, processes
and shards do not matter. Memory of a document: 16 bytes for the exact signature, 4 bytes per permutation for the near
one (512 by default), and about 100 bytes in `find_duplicates`.

Shape suffixes: N documents, 2 halves of a 128-bit hash, P permutations of a MinHash signature.
"""

import itertools
import math
import re
from dataclasses import dataclass
from types import ModuleType
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Le

from jaxinfra.config.limits import PositiveFraction, PositiveInt
from jaxinfra.packages import import_optional
from jaxinfra.prepare.documents.shingles import HASH_MULTIPLIER, hash128, ngram_hashes, word_hashes

_SEED = 1
_WEIGHTS = (0.05, 0.95)  # of false positives and of false negatives, when the bands are chosen
_BATCH_PAIRS = 16_384  # compared at once: 16 MiB with 128 permutations
_BATCH_NGRAMS = 2048  # hashed at once: 1 MiB with 128 permutations
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # Chinese and Japanese, written without spaces
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")


@dataclass(frozen=True, kw_only=True)
class Dedup:
    """Leaves out documents that equal an earlier one, or nearly do.

    Two documents are near duplicates if the Jaccard similarity of their word n-grams reaches the threshold. MinHash
    (Broder 1997) estimates it with an error of about sqrt(s (1 - s) / num_permutations), 0.035 by default. Locality-
    sensitive hashing proposes the pairs to compare: nine of ten at the threshold, nearly all above it. Case and
    punctuation are ignored, and a Chinese or Japanese character is a word.

    Attributes:
        near: whether to look for near duplicates too.
        threshold: Jaccard similarity from which on documents are near duplicates.
        num_permutations: hash functions of MinHash; a larger number is more exact, and slower.
        ngram_size: words of an n-gram.
    """

    near: bool = False
    threshold: PositiveFraction = 0.8
    num_permutations: Annotated[int, Ge(2), Le(4096)] = 128
    ngram_size: PositiveInt = 5


class Signer:
    """Computes signatures of texts; ConfigError if `dedup.near` needs datasketch, which is not installed."""

    def __init__(self, dedup: Dedup):
        self.dedup = dedup
        self._empty: Any = None  # MinHash of no n-grams; copying it is faster than drawing its permutations again
        if dedup.near:
            self._empty = _datasketch().MinHash(dedup.num_permutations, seed=_SEED, hashfunc=int, scheme="affine32")

    def __call__(self, text: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns the exact signature, uint64[2], and the MinHash uint32[num_permutations] or None."""
        exact = hash128(text.encode())
        if not self.dedup.near:
            return exact, None
        words = word_hashes(_WORD.findall(text.lower()))
        if not len(words):
            words = exact[:1]  # a text without words is near to itself only
        ngrams = ngram_hashes(words, min(self.dedup.ngram_size, len(words)))
        ngrams = np.unique(ngrams >> np.uint64(32))  # the scheme takes 32-bit hashes
        sketch = self._empty.copy()
        for start in range(0, len(ngrams), _BATCH_NGRAMS):
            sketch.update_batch(ngrams[start : start + _BATCH_NGRAMS].tolist())
        return exact, sketch.hashvalues


def find_duplicates(dedup: Dedup, exact_N2: np.ndarray, near_NP: np.ndarray | None) -> np.ndarray:
    """Returns which documents repeat an earlier one, from their signatures in order: bool[N].

    A document that is near to a dropped one is dropped too. `near_NP` is None if only exact duplicates are wanted.
    """
    is_duplicate_N = np.ones(len(exact_N2), bool)
    _, firsts = np.unique(exact_N2, axis=0, return_index=True)
    is_duplicate_N[firsts] = False
    if near_NP is not None:
        firsts = np.sort(firsts)
        is_duplicate_N[firsts[_find_near(dedup, near_NP, firsts)]] = True
    return is_duplicate_N


def _find_near(dedup: Dedup, near_NP: np.ndarray, firsts: np.ndarray) -> np.ndarray:
    """Returns which of the documents `firsts` are near to an earlier one of them: bool[len(firsts)].

    Only documents that share a band, a few neighboring values of their signatures, are compared (Leskovec et al.,
    Mining of Massive Datasets, section 3.4). In each group with a common band, all are compared with the first, those
    that are not near to it with the second, and so on.
    """
    # datasketch chooses the number of bands, b, and of values in a band, r.
    lsh = _datasketch().MinHashLSH(dedup.threshold, dedup.num_permutations, weights=_WEIGHTS)
    is_near = np.zeros(len(firsts), bool)
    for band in range(lsh.b):
        keys = np.zeros(len(firsts), np.uint64)  # hash of the band
        for column in range(band * lsh.r, (band + 1) * lsh.r):
            keys = keys * HASH_MULTIPLIER + near_NP[firsts, column]
        # Sorted keys 3 3 5 5 5 are the groups at positions 0 1 and 2 3 4; group_start is 0 0 2 2 2.
        order = np.argsort(keys, kind="stable")
        group_start = np.searchsorted(keys[order], keys[order])
        left = np.arange(len(order))  # positions
        for index in itertools.count():  # compares all that are left with the document number `index` of their group
            left = left[(left > group_start[left] + index) & ~is_near[order[left]]]
            if not len(left):
                break
            for batch in np.array_split(left, math.ceil(len(left) / _BATCH_PAIRS)):
                documents, earlier = firsts[order[batch]], firsts[order[group_start[batch] + index]]
                num_equal = np.count_nonzero(near_NP[documents] == near_NP[earlier], axis=1)
                is_near[order[batch]] = num_equal >= dedup.threshold * dedup.num_permutations
    return is_near


def _datasketch() -> ModuleType:
    return import_optional("datasketch", needed_by="dedup.near=true", install="jaxinfra[dedup]")
