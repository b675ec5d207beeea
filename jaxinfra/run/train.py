"""How long a run trains, and in what batches."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

from annotated_types import Ge, Lt

from jaxinfra.config import NOT_FINGERPRINTED, Problem
from jaxinfra.config.limits import PositiveInt
from jaxinfra.run.compiler_options import OptionSet


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long to train and in what batches.

    Attributes:
        steps: number of updates of the parameters.
        global_batch: samples (sequences, images) per step, over all devices.
        accumulate: number of microbatches per step (gradient accumulation).
        canonical: number of virtual shards of a batch, a power of two. Losses and parameters are then the same bits on
            every mesh of up to this number of devices, at a price in memory (see docs/parallelism.md). None is faster.
        eval_every: steps between evaluations. The last step is always followed by one; None evaluates only there.
        eval_samples: number of validation samples to evaluate on; None takes all.
        eval_tasks: tasks of lm-eval to run at each evaluation of a language model: names, or YAML files. Their metrics
            are eval/TASK/METRIC.
        compiler: name of a set of compiler options (see `jaxinfra.run.compiler_options`).
        skip_batches: ranges of batches that no step reads, such as ((120, 140),) for the batches 120 to 139 of the
            order of the data, counted from 0. A run that goes back after bad numbers records here what it leaves out
            (see `GuardConfig`), so that a replay leaves out the same.
        compile_cache: folder or URL that keeps compiled programs for the next start. "auto" is a folder in the user's
            cache folder, or JAX_COMPILATION_CACHE_DIR; None compiles at every start.
    """

    steps: Annotated[int, Ge(1), Lt(2**31)] = 1000
    global_batch: PositiveInt = 32
    accumulate: Annotated[PositiveInt, NOT_FINGERPRINTED] = 1
    canonical: Annotated[int, Ge(2)] | None = None
    eval_every: Annotated[PositiveInt | None, NOT_FINGERPRINTED] = 100
    eval_samples: PositiveInt | None = None
    eval_tasks: Annotated[tuple[str, ...], NOT_FINGERPRINTED] = ()
    skip_batches: tuple[tuple[int, int], ...] = ()
    compiler: Annotated[OptionSet, NOT_FINGERPRINTED] = "default"
    compile_cache: Annotated[str | None, NOT_FINGERPRINTED] = "auto"

    def evaluates_after(self, completed_steps: int) -> bool:
        """Whether to evaluate after this number of steps."""
        at_interval = self.eval_every is not None and completed_steps % self.eval_every == 0
        return at_interval or completed_steps == self.steps

    def batch_of_step(self, step: int) -> int:
        """Returns which batch of the order of the data a step reads; both are counted from 0.

        With `skip_batches=((120, 140),)`, step 119 reads batch 119, and step 120 reads batch 140.
        """
        for start, stop in sorted(self.skip_batches):
            if start <= step:
                step += stop - start
        return step

    def problems(self) -> Iterable[Problem]:
        """Yields ranges of `skip_batches` that overlap, and conflicts with the virtual shards of `canonical`."""
        yield from self._canonical_problems()
        ranges = sorted(self.skip_batches)
        are_ranges = all(0 <= start < stop for start, stop in ranges)
        if not are_ranges or any(next_start < stop for (_, stop), (next_start, _) in pairwise(ranges)):
            message = "must be ranges (FIRST, END) of batches, which do not overlap"
            yield Problem(fields=("skip_batches",), message=message, fix="use train.skip_batches=((120, 140),)")

    def _canonical_problems(self) -> Iterable[Problem]:
        """Yields conflicts with the virtual shards."""
        if self.canonical is None:
            return
        if self.canonical & (self.canonical - 1):
            power = 2 ** self.canonical.bit_length()  # the next one above
            message = "must be a power of two, as it is halved until each device has its virtual shards"
            yield Problem(fields=("canonical",), message=message, fix=f"use canonical={power}")
        if self.accumulate > 1:
            message = "virtual shards take the place of microbatches: each device computes its own one by one"
            fix = f"use accumulate=1 canonical={self.canonical * self.accumulate}"
            yield Problem(fields=("canonical", "accumulate"), message=message, fix=fix)
        if self.global_batch % self.canonical:
            samples = -(-self.global_batch // self.canonical)  # of a shard, rounded up
            message, fix = "each virtual shard has as many samples", f"use global_batch={samples * self.canonical}"
            yield Problem(fields=("global_batch", "canonical"), message=message, fix=fix)
