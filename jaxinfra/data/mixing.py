"""Mixes sources: chooses source and sample for each row of a batch, as a pure function of (seed, step).

The number of samples of a source is not random: it is rounded from its share. Sources are the leaves of a binary tree.
Of the first n samples that reach a node, its left child gets `round(n * left weight / weight)` and its right child the
rest. So the counts for any n are known without history, never decrease, and add up to n. The tree is Huffman's (1952):
an inner child has at most 2/3 of its parent's weight, so the rounding errors, at most 1/2 at each node, add up to less
than 2 at a leaf, however many sources there are.

Blocks of 64 samples are shuffled, so that no process reads one source alone. With w the share of a source,

    |(its samples among the first n) - n * w| < 2 + 64 / 4, and < 2 where a block ends.

Each change of the weights adds less than 2 to that, because counts continue from what was read. A step costs
O(sources + batch). Every source is read in its own epochs, each in its own order (see `order`).

Shape suffixes: S sources, T steps, B rows of a batch, N samples of batches, M samples of whole blocks, E block edges.
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
from jaxinfra.config.limits import NonNegativeInt
from jaxinfra.data.order import MAX_SIZE, Curriculum, epoch_keys, shuffled_ids, steps_per_chunk, stream_seed

BLOCK = 64  # samples that are shuffled together; few, so that every batch has about its share of every source


@dataclass(frozen=True, kw_only=True)
class MixStage:
    """Weights of the sources from a step on.

    Attributes:
        start_step: first step.
        weights: one for each source, at least 0; only their ratios matter. Decimals are exact: 0.1 is one tenth.
    """

    start_step: NonNegativeInt = 0
    weights: tuple[float, ...]

    def problems(self) -> Iterable[Problem]:
        """Yields a problem for weights that define no shares."""
        if not all(isfinite(weight) and weight >= 0 for weight in self.weights) or not any(self.weights):
            message, fix = "must be finite and at least 0, and one must be above 0", "use 1.0 for every source"
            yield Problem(fields=("weights",), message=message, fix=fix)


def stage_problems(stages: Sequence[MixStage], *, num_sources: int) -> Iterator[Problem]:
    """Yields problems of start steps that do not increase, and of stages without one weight for each source."""
    last = -1
    for i, stage in enumerate(stages):
        if len(stage.weights) != num_sources:
            message = f"there are {num_sources} sources and {len(stage.weights)} weights"
            fix = "give each source a weight, 0 to leave it out"
            yield Problem(fields=(f"stages.{i}.weights",), message=message, fix=fix)
        if (i == 0 and stage.start_step) or stage.start_step <= last:
            message = "the first stage must start at step 0, each other one after the one before it"
            fix = f"use start_step={0 if i == 0 else last + 1}{' or more' if i else ''}"
            yield Problem(fields=(f"stages.{i}.start_step",), message=message, fix=fix)
        last = max(last, stage.start_step)


class MixtureSampler:
    """Maps each step to the samples of its batch, from several sources or one."""

    def __init__(
        self,
        lengths: Sequence[int],
        stages: Sequence[MixStage] = (),
        *,
        global_batch: int,
        seed: int,
        curriculum: Curriculum | None = None,
    ):
        """Counts the samples before each stage; ValueError if an argument is out of range.

        `lengths` are the numbers of samples of the sources. A new source at the end changes how often the others are
        read, but not their order. Without `stages`, the weight of a source is its length.
        """
        stages = stages or (MixStage(weights=tuple(lengths)),)
        if not lengths or not all(1 <= length <= MAX_SIZE for length in lengths) or global_batch < 1:
            raise ValueError(
                f"lengths={list(lengths)}, global_batch={global_batch}: expected at least one source, 1 to 2**48 "
                "samples in each, and global_batch >= 1"
            )
        problems = [problem for stage in stages for problem in stage.problems()]
        for problem in [*stage_problems(stages, num_sources=len(lengths)), *problems]:
            raise ValueError(f"{', '.join(problem.fields)}: {problem.message}; {problem.fix}")
        self._length_S = np.array(lengths, np.uint64)
        self._seed_S = np.array([stream_seed(seed, source) for source in range(len(lengths))], np.uint64)
        self._block_seed = stream_seed(seed, -1)
        self._global_batch, self._curriculum = global_batch, curriculum
        self._cached_chunk = lru_cache(maxsize=16)(self._chunk)
        self._starts = [stage.start_step for stage in stages]
        self._shares = [_ExactShares(stage.weights) for stage in stages]
        self._counts_before = [[0] * len(lengths)]  # samples of each source before each stage
        for shares, start, end in zip(self._shares, self._starts, self._starts[1:], strict=False):
            self._counts_before.append(_add(self._counts_before[-1], shares.counts((end - start) * global_batch)))

    def sample_ids(self, step: int, rows: slice | np.ndarray = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """Returns source and sample id of the given rows of a step's batch: int64[rows] both, read-only.

        A chunk of steps is computed at once, as in `order.sample_ids`. ValueError if the step is negative or so large
        that sample numbers need more than 63 bits.
        """
        i = self._stage(step)
        chunk = steps_per_chunk(self._global_batch)
        first = step - (step - self._starts[i]) % chunk
        end = min([first + chunk, *self._starts[i + 1 : i + 2]])  # a chunk ends where the next stage starts, if any
        source_TB, sample_TB = self._cached_chunk(first, end - first)
        return source_TB[step - first, rows], sample_TB[step - first, rows]

    def _chunk(self, first: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns sources and samples of consecutive steps of one stage: int64[steps, global_batch] both."""
        counts_before, source_M, skip = self._blocks(first, steps)
        # Numbers the samples of each source in the order in which they occur, on from its count before the blocks.
        by_source = np.argsort(source_M, kind="stable")
        count_S = np.bincount(source_M, minlength=len(counts_before))
        number_M = np.empty(len(source_M), np.int64)
        number_M[by_source] = np.arange(len(source_M)) - np.repeat(np.cumsum(count_S) - count_S, count_S)
        number_M += np.array(counts_before)[source_M]
        batches = slice(skip, skip + steps * self._global_batch)
        source_N, number_N = source_M[batches], number_M[batches]
        size_N, seed_N = self._length_S[source_N], self._seed_S[source_N]
        sample_N = shuffled_ids(number_N, size=size_N, seed=seed_N, curriculum=self._curriculum)
        source_N.flags.writeable = sample_N.flags.writeable = False
        return source_N.reshape(steps, -1), sample_N.reshape(steps, -1)

    def counts(self, step: int) -> list[int]:
        """Returns how many samples of each source are read before a step; raises as `sample_ids`."""
        counts_before, source_M, skip = self._blocks(step, 1)
        return _add(counts_before, np.bincount(source_M[:skip], minlength=len(counts_before)).tolist())

    def _stage(self, step: int) -> int:
        if step < 0:
            raise ValueError(f"step={step}: expected 0 or more")
        return bisect_right(self._starts, step) - 1

    def _blocks(self, step: int, steps: int) -> tuple[list[int], np.ndarray, int]:
        """Returns the shuffled blocks that hold the batches of consecutive steps of one stage.

        Returns:
            The samples of each source before the blocks, the source of each sample in them, and the number of their
            samples that come before the first batch.
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
        index_M = np.arange(len(source_M), dtype=np.uint64)  # from the start of the first block
        hash_M = epoch_keys(self._block_seed, index_M + np.uint64(start + edges[0]))
        shuffled_M = np.lexsort((hash_M, index_M // np.uint64(BLOCK)))  # by block, then by hash
        return _add(self._counts_before[i], count_ES[0]), source_M[shuffled_M], skip


def _add(left: Sequence[int], right: Sequence[int]) -> list[int]:
    """Adds element by element, in Python integers, which cannot overflow."""
    return [a + b for a, b in zip(left, right, strict=True)]


class _ExactShares:
    """Splits any number of samples by weight, in whole numbers (see the module's docstring)."""

    def __init__(self, weights: Sequence[float]):
        exact = [Fraction(str(weight)) for weight in weights]  # of the decimal text, so that 0.1 is one tenth
        scale = lcm(*(weight.denominator for weight in exact))
        heap = [(int(weight * scale), source) for source, weight in enumerate(exact) if weight]
        heapq.heapify(heap)
        self._num_sources = node = len(weights)
        self._splits: list[tuple[int, int, int, int, int]] = []  # node, left and right child, left and node weight
        while len(heap) > 1:
            (left_weight, left), (right_weight, right) = heapq.heappop(heap), heapq.heappop(heap)
            self._splits.append((node, left, right, left_weight, left_weight + right_weight))
            heapq.heappush(heap, (left_weight + right_weight, node))
            node += 1
        self._splits.reverse()  # from the root down
        self._root, self._num_nodes = heap[0][1], node

    def counts(self, samples: int) -> list[int]:
        """Returns the number of samples of each source among the first `samples`."""
        count = [0] * self._num_nodes
        count[self._root] = samples
        for node, left, right, left_weight, weight in self._splits:
            count[left] = (2 * count[node] * left_weight + weight) // (2 * weight)  # rounds half up
            count[right] = count[node] - count[left]
        return count[: self._num_sources]
