"""Which sample of which source makes a row of a batch: a pure function of (seed, step), in O(sources + batch).

Nothing is drawn: a source gets its share exactly. Sources are the leaves of a binary tree; of every n samples that
come to a node, its left child gets `round(n * left weight / weight)` and its right child the others. So counts are
known for any n without history, in whole numbers of any size, never fall, and add up to n. The tree is Huffman's
(1952): a child with children of its own has at most 2/3 of its parent's weight, so an error of at most 1/2 made at
each node adds up to less than 2 at a leaf, however many sources there are.

Blocks of 64 samples are shuffled, so that no process reads one source alone. Then, with w the share of a source,

    |its samples among the first n - n * w| < 2 + 64 / 4, and < 2 where a block ends,

for the first stage of a run; each change of the weights adds less than 2 at its end, as counts go on from what was
read. A source is read in its own sequence of epochs, each in its own order (see `order`), whatever the weights.
"""

import heapq
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import isfinite, lcm

import numpy as np

from jaxinfra.config import Problem
from jaxinfra.config.limits import Natural
from jaxinfra.data.order import MAX_SIZE, Curriculum, epoch_keys, shuffled_ids, steps_together, stream_seed

BLOCK = 64  # samples that are shuffled among themselves; no more, so that a batch has about its share of every source


@dataclass(frozen=True, kw_only=True)
class MixStage:
    """What is read from a step on.

    Attributes:
        start_step: first step.
        weights: of each source, at least 0; only their ratios count. Decimal numbers are taken at their word: 0.1 is
            one tenth.
    """

    start_step: Natural = 0
    weights: tuple[float, ...]

    def problems(self) -> Iterable[Problem]:
        """Weights are numbers from 0 up, one at least above."""
        if not all(isfinite(weight) and weight >= 0 for weight in self.weights) or not any(self.weights):
            yield Problem(
                fields=("weights",),
                message="must be finite, none below 0 and one at least above it",
                fix="use 1.0 for every source",
            )


def stage_problems(stages: Sequence[MixStage], *, sources: int) -> Iterator[Problem]:
    """Yields what is wrong with `stages` that are each right by themselves."""
    last = -1
    for i, stage in enumerate(stages):
        if len(stage.weights) != sources:
            yield Problem(
                fields=(f"stages.{i}.weights",),
                message=f"there are {sources} sources and {len(stage.weights)} weights",
                fix="give each source one, 0 for none of it",
            )
        if (i == 0 and stage.start_step) or stage.start_step <= last:
            yield Problem(
                fields=(f"stages.{i}.start_step",),
                message="the first stage starts at step 0, each later one after the one before it",
                fix=f"use start_step={0 if i == 0 else last + 1}{' or more' if i else ''}",
            )
        last = max(last, stage.start_step)


class MixtureSampler:
    """The samples of every step of a run that reads several sources, or one."""

    def __init__(
        self,
        lengths: Sequence[int],
        stages: Sequence[MixStage] = (),
        *,
        global_batch: int,
        seed: int,
        curriculum: Curriculum | None = None,
    ):
        """Plans them; nothing grows with the steps. ValueError where an argument is out of range.

        Args:
            lengths: samples of each source. A source is known by its place: more of them at the end change how often
                the others are read, not in which order.
            stages: without any, each source has the weight of its length.
            global_batch: rows of a batch over all processes.
            seed: any integer.
            curriculum: how the first epochs of each source go.
        """
        stages = stages or (MixStage(weights=tuple(lengths)),)
        if not lengths or not all(1 <= length <= MAX_SIZE for length in lengths) or global_batch < 1:
            raise ValueError(
                f"lengths={list(lengths)}, global_batch={global_batch}: expected one source at least, "
                "1 to 2**48 samples in each, and global_batch >= 1"
            )
        wrong = [*stage_problems(stages, sources=len(lengths)), *(one for stage in stages for one in stage.problems())]
        if wrong:
            raise ValueError(f"{', '.join(wrong[0].fields)}: {wrong[0].message}; {wrong[0].fix}")
        self._length_S = np.array(lengths, np.uint64)
        self._seed_S = np.array([stream_seed(seed, source) for source in range(len(lengths))], np.uint64)
        self._block_seed = stream_seed(seed, -1)
        self._global_batch, self._curriculum = global_batch, curriculum
        self._together = lru_cache(maxsize=16)(self._worked_out)
        self._starts = [stage.start_step for stage in stages]
        self._shares = [_Shares(stage.weights) for stage in stages]
        self._before = [[0] * len(lengths)]  # samples of each source before each stage
        for shares, start, end in zip(self._shares, self._starts, self._starts[1:], strict=False):
            self._before.append(_sums(self._before[-1], shares.counts((end - start) * global_batch)))

    def sample_ids(self, step: int, rows: slice | np.ndarray = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """The source of each of these rows of a step's batch, and its sample there: int64[R] both, not to be written.

        Steps that follow one another are worked out together, as in `sample_ids`. ValueError where the step is negative
        or has samples beyond 2**63.
        """
        i = self._stage(step)
        steps = steps_together(self._global_batch)
        first = step - (step - self._starts[i]) % steps
        source_TB, sample_TB = self._together(first, min([first + steps, *self._starts[i + 1 : i + 2]]) - first)
        return source_TB[step - first, rows], sample_TB[step - first, rows]

    def _worked_out(self, first: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Sources and samples of some steps of one stage: int64[steps, global_batch] both."""
        before, source_M, skip = self._blocks(first, steps)
        by_source = np.argsort(source_M, kind="stable")
        count_S = np.bincount(source_M, minlength=len(before))
        number_M = np.empty(len(source_M), np.int64)
        number_M[by_source] = np.arange(len(source_M)) - np.repeat(np.cumsum(count_S) - count_S, count_S)
        number_M += np.array(before)[source_M]
        shape = steps, self._global_batch
        batches = slice(skip, skip + steps * self._global_batch)
        source_N, number_N = source_M[batches], number_M[batches]
        size_N, seed_N = self._length_S[source_N], self._seed_S[source_N]
        sample_N = shuffled_ids(number_N, size=size_N, seed=seed_N, curriculum=self._curriculum)
        found = source_N.reshape(shape), sample_N.reshape(shape)
        for array in found:
            array.flags.writeable = False
        return found

    def counts(self, step: int) -> list[int]:
        """Returns how many samples of each source are read before a step; raises as `ids`."""
        before, source_M, skip = self._blocks(step, 1)
        return _sums(before, np.bincount(source_M[:skip], minlength=len(before)).tolist())

    def _stage(self, step: int) -> int:
        if step < 0:
            raise ValueError(f"step={step}: expected 0 or more")
        return bisect_right(self._starts, step) - 1

    def _blocks(self, step: int, steps: int) -> tuple[list[int], np.ndarray, int]:
        """The blocks that hold the batches of some steps of one stage.

        These are how many samples of each source come before them, the source of each of their samples, and how many of
        those come before the batches.
        """
        samples = steps * self._global_batch
        if step * self._global_batch + samples >= 2**63 - BLOCK:
            raise ValueError(f"step={step}: expected samples that can be numbered in 63 bits")
        i = self._stage(step)
        start = self._starts[i] * self._global_batch
        first = step * self._global_batch - start
        skip = first % BLOCK
        edges = list(range(first - skip, first + samples + BLOCK, BLOCK))
        if i + 1 < len(self._starts):  # the last block of a stage ends with it
            edges[-1] = min(edges[-1], self._starts[i + 1] * self._global_batch - start)
        count_ES = [self._shares[i].counts(edge) for edge in edges]
        quota_ES = np.diff(np.array(count_ES), axis=0)
        source_M = np.repeat(np.tile(np.arange(quota_ES.shape[1]), len(quota_ES)), quota_ES.ravel())
        place_M = np.arange(len(source_M), dtype=np.uint64)
        hash_M = epoch_keys(self._block_seed, place_M + np.uint64(start + edges[0]))
        shuffled_M = np.lexsort((hash_M, place_M // np.uint64(BLOCK)))
        return _sums(self._before[i], count_ES[0]), source_M[shuffled_M], skip


def _sums(left: Sequence[int], right: Sequence[int]) -> list[int]:
    """Sums of whole numbers of any size."""
    return [a + b for a, b in zip(left, right, strict=True)]


class _Shares:
    """Exact shares of a sequence of samples, by weight."""

    def __init__(self, weights: Sequence[float]):
        exact = [Fraction(str(weight)) for weight in weights]
        scale = lcm(*(weight.denominator for weight in exact))
        heap = [(int(weight * scale), source) for source, weight in enumerate(exact) if weight]
        heapq.heapify(heap)
        self._sources = node = len(weights)
        self._splits: list[tuple[int, int, int, int, int]] = []
        while len(heap) > 1:
            (left_weight, left), (right_weight, right) = heapq.heappop(heap), heapq.heappop(heap)
            self._splits.append((node, left, right, left_weight, left_weight + right_weight))
            heapq.heappush(heap, (left_weight + right_weight, node))
            node += 1
        self._splits.reverse()  # from the root down
        self._root, self._nodes = heap[0][1], node

    def counts(self, samples: int) -> list[int]:
        """How many of the first samples are of each source."""
        count = [0] * self._nodes
        count[self._root] = samples
        for node, left, right, weight, total in self._splits:
            count[left] = (2 * count[node] * weight + total) // (2 * total)
            count[right] = count[node] - count[left]
        return count[: self._sources]
