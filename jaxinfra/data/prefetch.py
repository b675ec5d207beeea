"""Moves host batches to the devices in a background thread."""

import importlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from typing import Self

import jax
import numpy as np

from jaxinfra.data.interfaces import Batch
from jaxinfra.data.stopwatch import Stopwatch

CLOSE_S = 2.0
"""Longest wait for a read when a prefetcher is closed; one that hangs is left alone."""
DEPTH = 2
"""Number of batches that wait on the devices."""
_PUT_S = 0.1  # how often a thread that waits for room looks whether it should stop


def process_rows(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the rows of a global array `[global_batch, ...]` that this process's devices hold, sorted."""
    indices = sharding.addressable_devices_indices_map(shape).values()  # for each device, a slice of each dimension
    rows = np.arange(shape[0])
    return np.unique(np.concatenate([rows[index[0]] for index in indices if index is not None]))


def to_global(
    batch: Batch, shardings: Mapping[str, jax.sharding.Sharding], *, global_batch: int
) -> dict[str, jax.Array]:
    """Makes global arrays `[global_batch, ...]` from the rows of this process (see `process_rows`).

    `shardings` may have more names than the batch.
    """
    return {
        name: jax.make_array_from_process_local_data(shardings[name], local, (global_batch, *local.shape[1:]))
        for name, local in batch.items()
    }


class Prefetcher[T]:
    """Batches that are already on the devices, in the order of their steps. Call `close`, or use a `with` statement."""

    def __init__(self, batches: Iterable[tuple[int, Batch]], transfer: Callable[[Batch], T], *, depth: int = DEPTH):
        """Starts the thread, in which `transfer` moves host batches to the devices; `depth` of them wait there."""
        self.transfer_time = Stopwatch()  # what `transfer` took in the thread
        self._queue: queue.Queue[tuple[int, T] | BaseException] = queue.Queue(depth)
        self._stop = threading.Event()
        # Importing Grain patches `__import__` for all threads for a while (lazy imports of etils). An import that JAX
        # makes while it traces would then fail, so Grain is imported before the thread starts.
        importlib.import_module("grain")
        self._thread = threading.Thread(target=self._fill, args=(iter(batches), transfer), name="prefetch", daemon=True)
        self._thread.start()

    def poll(self, timeout_s: float) -> tuple[int, T] | None:
        """Returns the number of steps before the next batch, and the batch; None if it does not come in time.

        Raises the error of the background thread in place of its batch, and StopIteration after the last one.
        """
        if self._stop.is_set():
            raise StopIteration
        try:
            item = self._queue.get(timeout=timeout_s) if timeout_s > 0 else self._queue.get_nowait()
        except queue.Empty:
            return None
        if isinstance(item, BaseException):
            self.close()
            raise item
        return item

    def close(self) -> None:
        """Ends the thread and drops the batches that wait; may be called again. A read that hangs is left alone."""
        self._stop.set()
        deadline_s = time.monotonic() + CLOSE_S
        while self._thread.is_alive() and time.monotonic() < deadline_s:
            with suppress(queue.Empty):  # makes room for a put that blocks
                self._queue.get(timeout=0.01)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _fill(self, batches: Iterator[tuple[int, Batch]], transfer: Callable[[Batch], T]) -> None:
        """Runs in the thread: moves batches to the devices and queues them, and at the end queues an exception."""
        last: BaseException = StopIteration()
        try:
            with ExitStack() as at_end:
                at_end.callback(getattr(batches, "close", lambda: None))  # a generator then ends its own threads
                for step, batch in batches:
                    with self.transfer_time.running():
                        on_devices = transfer(batch)
                    self._put((step, on_devices))
                    if self._stop.is_set():
                        break
        except BaseException as error:  # raised again in the consumer
            last = error
        self._put(last)  # the consumer waits for a last item

    def _put(self, item: tuple[int, T] | BaseException) -> None:
        """Queues an item as soon as there is room, unless the prefetcher is closed before."""
        while not self._stop.is_set():
            with suppress(queue.Full):
                self._queue.put(item, timeout=_PUT_S)
                return
