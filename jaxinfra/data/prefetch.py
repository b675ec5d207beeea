"""Moves host batches to the devices in a background thread."""

import importlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from typing import Self

import jax
import numpy as np

from jaxinfra.data.interfaces import Batch
from jaxinfra.data.stopwatch import Stopwatch

CLOSE_S = 2.0
"""Longest wait for a read when a prefetcher is closed; one that hangs is left alone."""
DEPTH = 2
"""Number of batches that wait on the devices."""
_POLL_S, _BUSY_POLL_S = 0.1, 0.001


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
    """Iterates over `(step, batch)`, with the next batches already on the devices.

    An error in the background thread is raised in place of its batch. Call `close`, or use a `with` statement.
    `is_over` is called again and again while the consumer waits for a batch; once it returns True there are no more.

    Attributes:
        data_wait_s: seconds that the consumer waited for batches, while the devices had nothing to do.
        steady_wait_s: the same without the first batch, which cannot be prefetched.
        transfer_time: time that `transfer` took in the thread.
    """

    def __init__(
        self,
        batches: Iterable[tuple[int, Batch]],
        transfer: Callable[[Batch], T],
        *,
        depth: int = DEPTH,
        is_over: Callable[[], bool] = lambda: False,
        are_devices_busy: Callable[[], bool] = lambda: False,
        waiting: Callable[[], AbstractContextManager[object]] = nullcontext,
    ):
        """Starts the thread.

        Args:
            batches: the steps and their batches on the host.
            transfer: moves a batch to the devices.
            depth: number of batches that wait there for the consumer.
            is_over: whether no more batches are wanted.
            are_devices_busy: whether the devices still work on earlier steps; such a wait does not count.
            waiting: makes the context in which the consumer waits.
        """
        self._are_devices_busy, self._waiting = are_devices_busy, waiting
        self.data_wait_s, self.steady_wait_s, self.transfer_time = 0.0, 0.0, Stopwatch()
        self._is_first, self._is_over = True, is_over
        self._queue: queue.Queue[tuple[int, T] | BaseException] = queue.Queue(depth)
        self._stop = threading.Event()
        # Importing Grain patches `__import__` for all threads for a while (lazy imports of etils). An import that JAX
        # makes while it traces would then fail, so Grain is imported before the thread starts.
        importlib.import_module("grain")
        self._thread = threading.Thread(target=self._fill, args=(iter(batches), transfer), name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[int, T]:
        if self._stop.is_set():
            raise StopIteration
        item = self._next_while_busy()
        if item is None:
            start_s = time.perf_counter()
            with self._waiting():
                item = self._wait()
            if item is None:
                raise StopIteration
            wait_s = time.perf_counter() - start_s
            self.data_wait_s += wait_s
            self.steady_wait_s += 0.0 if self._is_first else wait_s
        self._is_first = False
        if isinstance(item, BaseException):
            self.close()
            raise item
        return item

    def _next_while_busy(self) -> tuple[int, T] | BaseException | None:
        """Returns the next item if it comes while the devices are busy."""
        with suppress(queue.Empty):
            return self._queue.get_nowait()
        while self._are_devices_busy():
            with suppress(queue.Empty):
                return self._queue.get(timeout=_BUSY_POLL_S)
        return None

    def _wait(self) -> tuple[int, T] | BaseException | None:
        """Waits for the next item; returns None if there is none and `is_over`."""
        while True:
            with suppress(queue.Empty):
                return self._queue.get(timeout=_POLL_S)
            if self._is_over():
                return None

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
        while not self._stop.is_set():
            with suppress(queue.Full):
                self._queue.put(item, timeout=_POLL_S)
                return
