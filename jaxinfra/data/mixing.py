"""Mixes sources: chooses source and sample for each row of a batch, as a pure function of (seed, step).

The number of samples of a source is not random: it is rounded from its share. Sources are the leaves of a binary tree.
Of the first n samples that reach a node, its left child gets `round(n * left weight / weight)` and its right child the
rest. So the counts for any n are known without history, never decrease, and add up to n. With weights of 5, 3 and 2,
the first source is the left child of the root, and the others share a node on the right with the weight 5. Of the first
7 samples, the first source gets round(7 * 5 / 10) = 4, the third one round(3 * 2 / 5) = 1, and the second one 2.

The tree is Huffman's (1952): an inner child has at most 2/3 of its parent's weight, so the rounding errors, at most 1/2
at each node, add up to less than 2 at a leaf, however many sources there are.

Blocks of 64 samples are shuffled, so that no process reads one source alone. With w the share of a source,

    |(its samples among the first n) - n * w| < 2 + 64 / 4, and < 2 where a block ends.

Each change of the weights adds less than 2 to that, because counts continue from what was read. A step costs
O(sources + batch). Every source is read in its own epochs, each in its own order (see `order`).

Shape suffixes: S sources, T steps, B rows of a batch, N samples of batches, M samples of whole blocks, E block edges,
K = E - 1 blocks.
"""

import heapq
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial
from itertools import pairwise
from math import isfinite, lcm

import numpy as np

from jaxinfra.config import Problem
from jaxinfra.config.limits import NonNegativeInt
from jaxinfra.data.order import Curriculum, seeded_hash, shuffled_ids, stream_seed

BLOCK = 64  # samples that are shuffled together; few, so that every batch has about its share of every source
_MAX_SIZE = 2**48  # samples of a source that `order.permute` can shuffle
_CHUNK = 1024  # samples to compute at once; arrays of a few thousand stay in the cache of a core


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
    for i, stage in enumerate(stages):
        if len(stage.weights) != num_sources:
            message = f"there are {num_sources} sources and {len(stage.weights)} weights"
            fix = "give each source a weight, 0 to leave it out"
            yield Problem(fields=(f"stages.{i}.weights",), message=message, fix=fix)
        field = f"stages.{i}.start_step"
        if i == 0 and stage.start_step:
            yield Problem(fields=(field,), message="the first stage must start at step 0", fix=f"use {field}=0")
        elif i and stage.start_step <= (previous := stages[i - 1].start_step):
            message, fix = "must start after the stage before it", f"use {field}={previous + 1} or more"
            yield Problem(fields=(field,), message=message, fix=fix)


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
        """Counts the samples before each stage; ValueError if the stages are invalid, or a size is out of range.

        `lengths` are the numbers of samples of the sources. A new source at the end changes how often the others are
        read, but not their order. Without `stages`, the weight of a source is its length.
        """
        if global_batch < 1 or not all(1 <= length <= _MAX_SIZE for length in lengths):
            raise ValueError(f"global_batch={global_batch}, sizes={lengths}: expected 1 or more and 1 to 2**48 samples")
        stages = stages or (MixStage(weights=tuple(lengths)),)
        problems = [problem for stage in stages for problem in stage.problems()]
        for problem in [*stage_problems(stages, num_sources=len(lengths)), *problems]:
            raise ValueError(f"{', '.join(problem.fields)}: {problem.message}; {problem.fix}")
        self._length_S = np.array(lengths, np.uint64)
        self._seed_S = np.array([stream_seed(seed, source) for source in range(len(lengths))], np.uint64)
        self._block_seed = stream_seed(seed, -1)  # the sources have the streams from 0 on
        self._global_batch, self._curriculum = global_batch, curriculum
        self._cached_chunk = lru_cache(maxsize=16)(self._chunk)
        self._start_steps = [stage.start_step for stage in stages]
        self._shares = [_ExactShares(stage.weights) for stage in stages]
        self._counts_before = [[0] * len(lengths)]  # samples of each source before each stage
        for shares, (start, end) in zip(self._shares[:-1], pairwise(self._start_steps), strict=True):
            self._counts_before.append(_add(self._counts_before[-1], shares.counts((end - start) * global_batch)))

    def sample_ids(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns source and sample id of each row of a step's batch: int64[global_batch] both, read-only.

        A chunk of steps is computed at once, because the overhead of NumPy calls for a single step would exceed its
        arithmetic. ValueError if the step is negative or so large that sample numbers need more than 63 bits.
        """
        stage = self._stage(step)
        start, steps = self._start_steps[stage], max(1, _CHUNK // self._global_batch)
        first_step = step - (step - start) % steps
        # The last chunk of a stage ends where the next stage starts, if there is one.
        end_step = min([first_step + steps, *self._start_steps[stage + 1 : stage + 2]])
        source_TB, sample_TB = self._cached_chunk(first_step, end_step - first_step)
        return source_TB[step - first_step], sample_TB[step - first_step]

    def counts(self, step: int) -> list[int]:
        """Returns how many samples of each source are read before a step; raises as `sample_ids`."""
        counts_before, source_M, skipped = self._blocks(step, 1)
        # The batch starts inside the first block; the samples of the block before it were read, too.
        return _add(counts_before, np.bincount(source_M[:skipped], minlength=len(counts_before)).tolist())

    def _chunk(self, first_step: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns sources and samples of consecutive steps of one stage: int64[steps, global_batch] both."""
        num_samples = steps * self._global_batch
        if len(self._length_S) == 1:  # all samples are of the only source, in whatever order the blocks put them
            source_N = np.zeros(num_samples, np.int64)
            read_N = self._first_sample(first_step, steps) + np.arange(num_samples)
        else:
            counts_before, source_M, skipped = self._blocks(first_step, steps)
            # Earlier reads of the same source, those in earlier blocks included.
            read_M = np.array(counts_before)[source_M] + _count_equal_before(source_M)
            in_batches = slice(skipped, skipped + num_samples)
            source_N, read_N = source_M[in_batches], read_M[in_batches]
        size_N, seed_N = self._length_S[source_N], self._seed_S[source_N]
        sample_N = shuffled_ids(read_N, size=size_N, seed=seed_N, curriculum=self._curriculum)
        source_N.flags.writeable = sample_N.flags.writeable = False  # the cache shares them
        return source_N.reshape(steps, -1), sample_N.reshape(steps, -1)

    def _stage(self, step: int) -> int:
        """Returns the index of the stage that a step is in."""
        if step < 0:
            raise ValueError(f"step={step}: expected 0 or more")
        return bisect_right(self._start_steps, step) - 1

    def _first_sample(self, first_step: int, steps: int) -> int:
        """Returns how many samples come before a step; ValueError if those of `steps` from there cannot be numbered."""
        if (first_step + steps) * self._global_batch >= 2**63 - BLOCK:
            raise ValueError(f"step={first_step}: expected samples that can be numbered in 63 bits")
        return first_step * self._global_batch

    def _blocks(self, first_step: int, steps: int) -> tuple[list[int], np.ndarray, int]:
        """Returns the shuffled blocks that hold the batches of consecutive steps of one stage.

        Returns:
            The samples of each source before the blocks, the source of each sample in them, and the number of their
            samples that come before the first batch.
        """
        num_samples, stage = steps * self._global_batch, self._stage(first_step)
        # Blocks are counted from the start of the stage. A batch of 100 samples from 100 to 199 lies in the blocks with
        # the edges 64, 128, 192 and 256, of which 36 samples come before it.
        stage_start = self._start_steps[stage] * self._global_batch
        first = self._first_sample(first_step, steps) - stage_start
        skipped = first % BLOCK
        edges = list(range(first - skipped, first + num_samples + BLOCK, BLOCK))
        if stage + 1 < len(self._start_steps):  # the last block of a stage ends with it
            edges[-1] = min(edges[-1], self._start_steps[stage + 1] * self._global_batch - stage_start)
        count_ES = [self._shares[stage].counts(edge) for edge in edges]
        # Lists the sources of each block in order: counts of [[2, 1], [1, 2]] give 0 0 1 and 0 1 1. Then shuffles them.
        block_count_KS = np.diff(np.array(count_ES), axis=0)
        num_blocks, num_sources = block_count_KS.shape
        source_M = np.repeat(np.tile(np.arange(num_sources), num_blocks), block_count_KS.ravel())
        index_M = np.arange(len(source_M))  # from the start of the first block
        hash_M = seeded_hash(self._block_seed, index_M + (stage_start + edges[0]))
        shuffled_M = np.lexsort((hash_M, index_M // BLOCK))  # by block, then by hash
        return _add(self._counts_before[stage], count_ES[0]), source_M[shuffled_M], skipped


class OrderedDataset:
    """The part of a `Dataset` that knows the order of its samples: those of one source, or of several."""

    def __init__(
        self,
        names: Sequence[str],
        lengths: Sequence[int],
        *,
        seed: int,
        stages: Sequence[MixStage] = (),
        curriculum: Curriculum | None = None,
    ):
        """`lengths` are the training samples of each source; the other arguments are those of `MixtureSampler`."""
        self._names, self._lengths, self._first_ids = names, lengths, np.cumsum([0, *lengths])
        make_sampler = partial(MixtureSampler, lengths, stages, seed=seed, curriculum=curriculum)
        self._sampler = lru_cache(maxsize=1)(make_sampler)  # keeps one, because a sampler caches chunks of steps

    def sample_ids(self, step: int, global_batch: int) -> np.ndarray:
        """Returns the training samples of the global batch of a step, int64[global_batch]."""
        source_B, sample_B = self._sampler(global_batch=global_batch).sample_ids(step)
        return self._first_ids[source_B] + sample_B

    def epochs_at(self, step: int, global_batch: int) -> Iterator[str]:
        """Yields a line for each source, with the number of its epochs that were read before a step."""
        counts = self._sampler(global_batch=global_batch).counts(step)
        for name, length, count in zip(self._names, self._lengths, counts, strict=True):
            yield f"{name}: {count / length:.3f} epochs before"


def _add(left: Sequence[int], right: Sequence[int]) -> list[int]:
    """Adds element by element, in Python integers, which cannot overflow."""
    return [a + b for a, b in zip(left, right, strict=True)]


def _count_equal_before(source_M: np.ndarray) -> np.ndarray:
    """Returns for each element how many equal ones come before it: [1, 0, 1, 1, 0] -> [0, 0, 1, 2, 1]."""
    by_source = np.argsort(source_M, kind="stable")  # 1, 4, 0, 2, 3: where the 0s are, then the 1s
    sorted_M = source_M[by_source]  # 0, 0, 1, 1, 1
    count_M = np.empty_like(source_M)
    count_M[by_source] = np.arange(len(source_M)) - np.searchsorted(sorted_M, sorted_M)  # minus 0, 0, 2, 2, 2
    return count_M


class _ExactShares:
    """Splits any number of samples by weight, in whole numbers (see the module's docstring)."""

    def __init__(self, weights: Sequence[float]):
        """Builds Huffman's tree over the sources with a weight above 0."""
        exact = [Fraction(str(weight)) for weight in weights]  # of the decimal text, so that 0.1 is one tenth
        scale = lcm(*(weight.denominator for weight in exact))
        # A leaf has the number of its source; inner nodes are numbered from `len(weights)` on.
        heap = [(int(weight * scale), source) for source, weight in enumerate(exact) if weight]
        heapq.heapify(heap)
        self._num_sources = node = len(weights)
        self._splits: list[tuple[int, int, int, int, int]] = []  # node, left and right child, left and node weight
        while len(heap) > 1:  # joins the two lightest nodes
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
