"""Documents that repeat others: exactly, or nearly, by the share of runs of words that two have in common.

Signatures are a function of a text alone, and what is found is a function of the signatures in their order: never of
threads, processes or shards. A signature takes 16 bytes a document, and near ones 4 bytes more for each permutation
(528 bytes with 128); `duplicates` takes about 100 bytes a document beyond them.
"""

import itertools
import re
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Le

from jaxinfra.config.limits import Count, PositiveShare
from jaxinfra.packages import import_optional
from jaxinfra.prepare.documents.shingles import STEP, digest_of_bytes, run_codes, word_codes

_SEED = 1  # of the permutations
_WEIGHTS = (0.05, 0.95)  # of pairs that are compared in vain, and of pairs that are missed
_PAIRS = 16_384  # that are compared together: 16 MiB with 128 permutations
_BATCH = 2048  # runs that are hashed together: 1 MiB with 128 permutations
_LETTERS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # of Chinese and Japanese, which has no spaces
_WORD = re.compile(rf"[{_LETTERS}]|[^\W{_LETTERS}]+")


@dataclass(frozen=True, kw_only=True)
class Dedup:
    """Which documents are left out because an earlier one is the same, or nearly.

    Near duplicates are found by MinHash (Broder 1997), which estimates the share with an error of about
    sqrt(share (1 - share) / permutations), 0.035 by default. Pairs are compared as locality-sensitive hashing
    proposes them: nine of ten that just reach the threshold, nearly all above it.

    Attributes:
        near: whether to look for near duplicates too.
        threshold: share of runs of words, of all that two documents have, from which on they are near.
        permutations: of a signature; more are more exact and take more time and memory.
        ngram: words of a run; case and punctuation do not count, and each letter of Chinese and Japanese is a word.
    """

    near: bool = False
    threshold: PositiveShare = 0.8
    permutations: Annotated[int, Ge(2), Le(4096)] = 128
    ngram: Count = 5


class Signer:
    """Makes signatures; a ConfigError if near duplicates are asked for, and datasketch is not installed."""

    def __init__(self, dedup: Dedup):
        self.dedup = dedup
        self._blank: Any = None
        if dedup.near:  # a sketch of nothing; its permutations are 32 bits wide
            self._blank = _library().MinHash(dedup.permutations, seed=_SEED, hashfunc=int, scheme="affine32")

    def exact(self, text: str) -> np.ndarray:
        """Returns what is equal for equal texts alone: the 128 bits of XXH3, uint64[2]."""
        return digest_of_bytes(text.encode())

    def __call__(self, text: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns both signatures; the second one is None where only exact duplicates are looked for.

        It is uint32[permutations], of which about as many are equal for two texts as their runs of words are.
        """
        if not self.dedup.near:
            return self.exact(text), None
        codes = word_codes(_WORD.findall(text.lower()))
        if not len(codes):
            codes = self.exact(text)[:1]  # near to itself alone
        runs = np.unique(run_codes(codes, min(self.dedup.ngram, len(codes))) >> np.uint64(32))
        sketch = self._blank.copy()
        for start in range(0, len(runs), _BATCH):
            sketch.update_batch(runs[start : start + _BATCH].tolist())
        return self.exact(text), sketch.hashvalues


def duplicates(dedup: Dedup, exact_N2: np.ndarray, near_NP: np.ndarray | None) -> np.ndarray:
    """Tells which documents repeat an earlier one, of their signatures in order: bool[N].

    The first of equal documents is kept. A near duplicate is dropped also when the earlier one that it is near to was.
    `near_NP` is None where only exact duplicates are looked for. Raises as `Signer`.
    """
    repeated_N = np.ones(len(exact_N2), bool)
    both = np.ascontiguousarray(exact_N2).view("u8,u8").reshape(-1)
    repeated_N[np.unique(both, return_index=True)[1]] = False
    if near_NP is not None:
        firsts = np.flatnonzero(~repeated_N)
        repeated_N[firsts[_near(dedup, near_NP, firsts)]] = True
    return repeated_N


def _near(dedup: Dedup, near_NP: np.ndarray, firsts: np.ndarray) -> np.ndarray:
    """Tells which of the documents `firsts`, in their order, are near to an earlier one of them: bool.

    Only those are compared that share a band: a few neighboring numbers of their signatures (Leskovec et al., Mining
    of Massive Datasets, section 3.4). Of each group that does, all are compared with its first, those that are not
    near to that with its second, and so on.
    """
    # How many bands there are, and numbers in each, so that few pairs above the threshold are missed.
    lsh = _library().MinHashLSH(dedup.threshold, dedup.permutations, weights=_WEIGHTS)
    found = np.zeros(len(firsts), bool)
    for band in range(lsh.b):
        keys = np.zeros(len(firsts), np.uint64)
        for column in range(band * lsh.r, (band + 1) * lsh.r):
            keys = keys * STEP + near_NP[firsts, column]
        order = np.argsort(keys, kind="stable")
        group = np.searchsorted(keys[order], keys[order])  # where the group of each begins
        later = np.arange(len(order))
        for first in itertools.count():
            later = later[(group[later] + first < later) & ~found[order[later]]]
            if not len(later):
                break
            for part in np.array_split(later, -(-len(later) // _PAIRS)):
                ours, theirs = firsts[order[part]], firsts[order[group[part] + first]]
                same = np.count_nonzero(near_NP[ours] == near_NP[theirs], axis=1)
                found[order[part]] = same >= dedup.threshold * dedup.permutations
    return found


def _library() -> Any:
    return import_optional("datasketch", needed_by="dedup.near=true", install="jaxinfra[dedup]")
