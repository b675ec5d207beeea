"""The host batches of a run, made of samples.

The batch of a step is a pure function of the data, the seed and the step. So there is no iterator state: a run goes
on by starting at its step, with any number of processes, and sees every sample exactly once an epoch. What tells
processes apart is only which rows of the global batch each of them reads.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import closing

import numpy as np

from jaxinfra.data.interfaces import Batch, DataConfig, Samples
from jaxinfra.data.stopwatch import Stopwatch

_MOST_AHEAD = 16  # batches; more would only be read in vain where a run ends early
Rows = slice | np.ndarray  # rows of the global batch that this process reads


class BatchLoader:
    """The host batches of a range of steps; iterating yields `(step, batch)`, from the start each time.

    Without `ids` the samples come in their own order, once, and rows beyond the last one repeat it with `weights` of 0,
    so that all shapes are the same; such batches always have `weights`. It is also a random-access source: item i is
    the batch of step `start_step + i`, made without the ones before it.
    """

    def __init__(
        self,
        data: DataConfig,
        samples: Samples,
        *,
        global_batch: int,
        rows: Rows,
        start_step: int,
        steps: int,
        ids: Callable[[int, int], np.ndarray] | None,
    ):
        """Plans the batches of `start_step` to `start_step + steps - 1`; reads none yet.

        `data` says how far ahead to read and by how many threads; of `global_batch` rows over all processes, `rows` are
        read here; `ids` gives the samples of a step (see `Dataset.sample_ids`), None takes them in their own order.
        """
        self.samples = samples
        self._data, self._ids = data, ids
        self._global_batch, self._rows = global_batch, np.arange(global_batch)[rows]
        self._start_step, self._steps = start_step, steps
        self._making = Stopwatch()

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, index: int) -> tuple[int, Batch]:
        """The step `start_step + index` and its batch, computed from nothing else."""
        if not 0 <= index < self._steps:
            raise IndexError(index)
        step = self._start_step + index
        with self._making.running():
            if self._ids is None:
                return step, self._fixed_batch(step)
            return step, self.samples.read(self._ids(step, self._global_batch)[self._rows], weighted=False)

    @property
    def stages_s(self) -> Mapping[str, float]:
        """What reading, and making batches of what is read, took so far: each divided by the threads that do it."""
        reading_s, threads = self.samples.reading_s, self._data.threads
        return {"reading": reading_s / threads, "decoding": (self._making.total_s - reading_s) / threads}

    def __iter__(self) -> Generator[tuple[int, Batch], None, None]:
        if not self._steps:
            return
        step, batch = self[0]  # which tells how large they are
        yield step, batch
        # Grain imports JAX: the first batch does not wait for that, and who looks at single batches has no use for it.
        from grain import MapDataset, ReadOptions

        fitting = self._data.prefetch_bytes // sum(array.nbytes for array in batch.values())
        ahead = max(1, min(fitting, _MOST_AHEAD))  # batches that may be there or in the making, besides this one
        options = ReadOptions(num_threads=min(self._data.threads, ahead), prefetch_buffer_size=ahead)
        rest = MapDataset.source(self)[1:].to_iter_dataset(options)
        with closing(iter(rest)) as batches:
            yield from batches

    def _fixed_batch(self, step: int) -> Batch:
        ids, count = step * self._global_batch + self._rows, len(self.samples)
        batch = self.samples.read(np.minimum(ids, count - 1), weighted=True)
        real = (ids < count).astype(np.float32).reshape(-1, *(1,) * (batch["weights"].ndim - 1))
        return batch | {"weights": batch["weights"] * real}


def validation_batches(data: DataConfig, samples: Samples, *, global_batch: int, rows: Rows) -> BatchLoader:
    """All samples in their own order, the same at every evaluation (see `BatchLoader`)."""
    steps = -(-len(samples) // global_batch)
    return BatchLoader(data, samples, global_batch=global_batch, rows=rows, start_step=0, steps=steps, ids=None)
