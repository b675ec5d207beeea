"""Makes host batches ahead of time, in threads.

The batch of a step depends on the data, the seed and the step alone, and every process reads its own rows of it. So
a resumed run starts at its step, and reads every sample exactly once an epoch with any number of processes.

With `on_damage="skip"`, a row whose sample is damaged holds zeros, weights too. So the shape of the batch and the order
of all other samples stay as they are, and the same damage gives the same batches to any number of processes.
"""

import logging
from collections.abc import Callable, Generator, Mapping
from contextlib import closing

import numpy as np

from jaxinfra.data.interfaces import Batch, DataConfig, Samples
from jaxinfra.data.stopwatch import Stopwatch
from jaxinfra.errors import ConfigError, DataError, JaxinfraError
from jaxinfra.failpoints import failpoint

MAX_SKIPPED_SHARE, MIN_MAX_SKIPPED = 0.01, 16
"""With `on_damage="skip"`, a process may leave out this share of the samples of a split, or this number if larger."""

_MAX_PREFETCH = 16  # batches; more would be wasted work when a run ends
_MAX_NAMED = 8  # samples in a message

_log = logging.getLogger(__name__)
type Rows = slice | np.ndarray  # rows of a global batch


def batches_ahead(data: DataConfig, batch_bytes: int) -> int:
    """Returns the number of host batches to make ahead."""
    return max(1, min(data.prefetch_bytes // batch_bytes, _MAX_PREFETCH))


class BatchLoader:
    """Host batches of a range of steps: iterate over `(step, batch)`, or index one batch without those before it."""

    def __init__(
        self,
        data: DataConfig,
        samples: Samples,
        *,
        global_batch: int,
        rows: Rows,
        start_step: int,
        steps: int,
        sample_ids: Callable[[int, int], np.ndarray] | None,
    ):
        """Sets the range of steps, and the `rows` of the global batch that this process reads; reads nothing yet.

        `sample_ids` is `Dataset.sample_ids`. None reads all samples once in their own order, with `weights`. Rows past
        the last sample repeat it with weight 0, so that all batches have the same shape.
        """
        self.samples = samples
        self._data, self._sample_ids = data, sample_ids
        self._global_batch, self._rows = global_batch, np.arange(global_batch)[rows]
        self._start_step, self._steps = start_step, steps
        self._total_time = Stopwatch()
        self._skipped: dict[int, list[int]] = {}  # step -> samples that its batch leaves out
        self._damaged: set[int] = set()

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, index: int) -> tuple[int, Batch]:
        if not 0 <= index < self._steps:
            raise IndexError(index)
        step = self._start_step + index
        if self._sample_ids is not None:  # in training
            failpoint("data", step + 1)
        with self._total_time.running():
            if self._sample_ids is None:
                return step, self._sequential_batch(step)
            return step, self._read(step, self._sample_ids(step, self._global_batch)[self._rows])

    def take_skipped(self, end_step: int) -> dict[int, list[int]]:
        """Returns the samples that batches of this process have left out, by step, before a step; each step once."""
        return {step: self._skipped.pop(step) for step in sorted(self._skipped) if step < end_step}

    @property
    def stage_times_s(self) -> Mapping[str, float]:
        """Seconds of reading storage and of decoding so far, summed over the threads and divided by their number."""
        read_s, threads = self.samples.read_time_s, self._data.threads
        return {"reading": read_s / threads, "decoding": (self._total_time.total_s - read_s) / threads}

    def __iter__(self) -> Generator[tuple[int, Batch], None, None]:
        if not self._steps:
            return
        step, batch = self[0]  # its size tells how many batches fit in `prefetch_bytes`
        yield step, batch
        # Grain imports JAX, which takes seconds: the first batch, and users of single batches, do not wait for it.
        from grain import MapDataset, ReadOptions

        ahead = batches_ahead(self._data, sum(array.nbytes for array in batch.values()))
        options = ReadOptions(num_threads=min(self._data.threads, ahead), prefetch_buffer_size=ahead)
        rest = MapDataset.source(self)[1:].to_iter_dataset(options)
        with closing(iter(rest)) as batches:
            try:
                yield from batches
            except JaxinfraError as error:
                error.__notes__ = []  # one by Grain, about its frames, which would end the line of the error
                raise

    def _sequential_batch(self, step: int) -> Batch:
        """Returns a batch of samples in their own order, where rows past the last sample repeat it with weight 0."""
        ids, last = step * self._global_batch + self._rows, len(self.samples) - 1
        batch = self._read(step, np.minimum(ids, last))
        weights = batch["weights"].copy()
        weights[ids > last] = 0
        return batch | {"weights": weights}

    def _read(self, step: int, ids: np.ndarray) -> Batch:
        """Reads samples; if some are damaged, reads them one by one, and puts zeros in place of the damaged ones."""
        weighted = self._data.always_weighted(validation=self._sample_ids is None)
        try:
            return self.samples.read(ids, weighted=weighted)
        except DataError:
            specs = self._data.batch_spec(validation=True)
            blank = {name: np.zeros((1, *spec.shape), spec.dtype) for name, spec in specs.items()}
            parts: list[Batch] = []
            errors: dict[int, DataError] = {}
            for sample in ids.tolist():
                try:
                    parts.append(self.samples.read(np.array([sample]), weighted=weighted))
                except DataError as error:
                    errors[sample] = error
                    parts.append(blank)
        if errors:
            self._skip(step, errors)
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _skip(self, step: int, errors: Mapping[int, DataError]) -> None:
        """Records the damaged samples of a batch; DataError if they must not be left out, or if they are too many."""
        split = "validation" if self._sample_ids is None else "training"
        named = ", ".join(map(str, [*errors][:_MAX_NAMED])) + (", ..." if len(errors) > _MAX_NAMED else "")
        noun = "sample" if len(errors) == 1 else "samples"
        line = f"{split} {noun} {named}: {next(iter(errors.values()))}"
        if self._data.on_damage == "stop":
            has_field = "on_damage" in vars(self._data)  # else it is the class attribute, which cannot be overridden
            raise DataError(f"{line}, or use data.on_damage=skip to leave such samples out" if has_field else line)
        self._damaged |= errors.keys()
        limit = max(MIN_MAX_SKIPPED, int(MAX_SKIPPED_SHARE * len(self.samples)))
        if len(self._damaged) > limit:
            raise DataError(
                f"{line}; damaged {split} samples: {len(self._damaged)}, data.on_damage=skip allows {limit}"
            )
        self._skipped[step] = [*errors]
        _log.warning("%s %d leaves out %s", "step" if split == "training" else "evaluation batch", step + 1, line)


def validation_batches(data: DataConfig, samples: Samples, *, global_batch: int, rows: Rows) -> BatchLoader:
    """Returns batches of all samples in their own order, the same at every evaluation."""
    steps = -(-len(samples) // global_batch)  # rounded up
    return BatchLoader(data, samples, global_batch=global_batch, rows=rows, start_step=0, steps=steps, sample_ids=None)


def check_batch(batch: Batch, data: DataConfig, rows: int) -> None:
    """Raises ConfigError if a batch does not have this number of rows and the arrays of `DataConfig.batch_spec`."""
    name, spec = type(data).__qualname__, data.batch_spec(validation=True)
    missing = data.batch_spec(validation=False).keys() - batch.keys()
    if missing or batch.keys() - spec.keys():
        raise ConfigError(
            f"{name}: a batch has {', '.join(batch)}; return the arrays of its batch_spec: {', '.join(spec)}"
        )
    for field, array in batch.items():
        expected = (rows, *spec[field].shape), spec[field].dtype
        if (array.shape, array.dtype.name) != expected:
            raise ConfigError(
                f"{name}: {field} of a batch is {array.dtype.name}{list(array.shape)}, its batch_spec says "
                f"{expected[1]}{list(expected[0])}; make them equal"
            )
