"""From host batches to device arrays: which rows a process reads, and a thread that places them ahead."""

import importlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress

import jax
import numpy as np

from jaxinfra.data.interfaces import Batch
from jaxinfra.data.stopwatch import Stopwatch


def process_rows(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> np.ndarray:
    """The rows of a global array [global_batch, ...] that this process's devices hold, sorted."""
    indices = sharding.addressable_devices_indices_map(shape).values()
    every_row = np.arange(shape[0])
    return np.unique(np.concatenate([every_row[index[0]] for index in indices if index is not None]))


def to_global(
    batch: Batch, shardings: Mapping[str, jax.sharding.Sharding], *, global_batch: int
) -> dict[str, jax.Array]:
    """Puts arrays [rows, ...] of `process_rows` on this process's devices: parts of global arrays [global_batch, ...].

    `shardings` say where each of them goes; more names than the batch has do no harm.
    """
    return {
        name: jax.make_array_from_process_local_data(shardings[name], local, (global_batch, *local.shape[1:]))
        for name, local in batch.items()
    }


class Prefetcher[T]:
    """Places batches ahead in a background thread: the next ones are on the devices when asked for.

    Iterating yields `(step, placed)`. An error in the thread is raised where the batch would have come. Leave
    it by `close`, or use it in a `with` statement.

    Attributes:
        data_wait_s: time that the consumer has waited for batches.
        late_s: that time without the wait for the first batch, which nothing can be made before.
        placing: time that placing took.
    """

    def __init__(self, batches: Iterable[tuple[int, Batch]], place: Callable[[Batch], T], *, depth: int = 2):
        """Starts the thread; at most `depth` batches that `place` has placed wait, one more is in the making."""
        self.data_wait_s, self.late_s, self.placing = 0.0, 0.0, Stopwatch()
        self._taken = 0
        self._queue: queue.Queue[tuple[int, T] | BaseException] = queue.Queue(depth)
        self._stop = threading.Event()
        # Grain is imported while no other thread imports: it patches `__import__` for all (lazy imports of etils),
        # and an import that JAX makes while it traces would then fail.
        importlib.import_module("grain")
        self._thread = threading.Thread(
            target=self._fill, args=(iter(batches), place), name="place-batches", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> "Prefetcher[T]":
        return self

    def __next__(self) -> tuple[int, T]:
        if self._stop.is_set():
            raise StopIteration
        start_s = time.perf_counter()
        item = self._queue.get()
        waited_s = time.perf_counter() - start_s
        self.data_wait_s += waited_s
        self.late_s += waited_s if self._taken else 0.0
        self._taken += 1
        if isinstance(item, BaseException):
            self.close()
            raise item
        return item

    def close(self) -> None:
        """Ends the thread and drops the batches that wait; may be called again."""
        self._stop.set()
        while self._thread.is_alive():
            with suppress(queue.Empty):  # makes room for a put that blocks
                self._queue.get(timeout=0.01)
        self._thread.join()

    def __enter__(self) -> "Prefetcher[T]":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _fill(self, batches: Iterator[tuple[int, Batch]], place: Callable[[Batch], T]) -> None:
        last: BaseException = StopIteration()
        try:
            with ExitStack() as at_end:
                at_end.callback(getattr(batches, "close", lambda: None))  # a generator then ends its own threads
                for step, batch in batches:
                    with self.placing.running():
                        placed = place(batch)
                    self._queue.put((step, placed))
                    if self._stop.is_set():
                        break
        except BaseException as error:  # whatever it is belongs to the consumer
            last = error
        finally:  # without a last item the consumer would wait for ever
            self._queue.put(last)
