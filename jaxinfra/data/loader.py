"""From a token store to device arrays: the host batches of a run, and their way onto the mesh.

The batch of a step is a pure function of the store, the seed and the step. So there is no iterator state: a
run goes on by starting at its step, with any number of processes, and sees every window exactly once an
epoch. What tells processes apart is only which rows of the global batch each of them reads.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass

import grain
import jax
import numpy as np

from jaxinfra.config import Problem
from jaxinfra.data.corpus import Corpus, Split
from jaxinfra.data.manifest import check_recipe
from jaxinfra.data.order import sample_ids
from jaxinfra.data.store import PREPARE, TokenStore
from jaxinfra.data.windows import Batch, split_inputs_targets, window_count
from jaxinfra.errors import ConfigError

Rows = slice | np.ndarray
"""Rows of the global batch that this process reads."""


@dataclass(frozen=True, kw_only=True)
class TokenData:
    """Training on windows of a token store.

    Attributes:
        store: folder of the store; `prepare` makes it.
        corpus: the recipe that the store is made from.
        seq_len: tokens that a row predicts.
        seed: of the order of windows.
        prefetch: host batches that are made ahead.
        threads: threads that make host batches.
        mask_documents: whether attention, positions and loss keep the documents of a window apart.
    """

    store: str
    corpus: Corpus = Corpus()
    seq_len: int = 1024
    seed: int = 0
    prefetch: int = 4
    threads: int = 2
    mask_documents: bool = True

    def problems(self) -> Iterable[Problem]:
        """Yields what is wrong with the numbers; the store is looked at by `open_store`."""
        if not self.store:
            yield Problem(fields=("store",), message="names no folder", fix="use store=PATH")
        for name in ("seq_len", "prefetch", "threads"):
            if getattr(self, name) < 1:
                yield Problem(fields=(name,), message="must be at least 1", fix=f"use {name}=1 or more")


def open_store(data: TokenData, *, fix: str = PREPARE) -> TokenStore:
    """Opens the store of `data` and checks that it suits.

    Args:
        data: the config.
        fix: the command that makes the store, for the error when there is none.

    Raises:
        ConfigError: there is no store, it has another recipe, or it is shorter than one window.
        DataError: it is damaged.
        StorageError: it may not be read.
    """
    store = TokenStore.open(data.store, fix=fix)
    check_recipe(store.manifest, data.corpus, data.store)
    _windows(data, store, "train")
    return store


def check_vocab(store: TokenStore, vocab_size: int) -> None:
    """Refuses a model whose vocabulary is smaller than the store's.

    Raises:
        ConfigError: it is; ids beyond the model's embedding would be read as garbage.
    """
    if store.manifest.vocab_size > vocab_size:
        raise ConfigError(
            f"model.vocab_size={vocab_size}: the store {store.path} has {store.manifest.vocab_size} tokens; "
            f"use model.vocab_size={store.manifest.vocab_size} or more"
        )


class Batches:
    """The host batches of a range of steps; iterating yields `(step, batch)`, from the start each time.

    A batch is the mapping of `split_inputs_targets` with this process's rows. With `fixed` the windows come
    in the order of the text, once, and rows beyond the last window repeat it with `weights` of 0, so that all
    shapes are the same; such batches always have `weights`. It is also a random-access source: item i is the
    batch of step `start_step + i`, made without the ones before it.
    """

    def __init__(
        self,
        data: TokenData,
        *,
        split: Split,
        global_batch: int,
        rows: Rows,
        start_step: int,
        steps: int,
        fixed: bool = False,
        windows: int | None = None,
        store: TokenStore | None = None,
    ):
        """Plans the batches of `start_step` to `start_step + steps - 1`; reads none yet.

        Args:
            data: the config.
            split: which split to read.
            global_batch: rows of a batch over all processes.
            rows: those of them to read here.
            start_step: first step.
            steps: number of batches.
            fixed: in the order of the text instead of the seed's.
            windows: use only the first so many windows of the split; None uses all.
            store: the store if it is open already.

        Raises:
            ConfigError: the store does not suit `data`.
        """
        self._store = open_store(data) if store is None else store
        self._data = data
        self._split: Split = split
        self._windows = _windows(data, self._store, split, at_most=windows)
        self._global_batch = global_batch
        self._rows = np.arange(global_batch)[rows]
        self._start_step = start_step
        self._steps = steps
        self._fixed = fixed

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, index: int) -> tuple[int, Batch]:
        """The step `start_step + index` and its batch, computed from nothing else."""
        if not 0 <= index < self._steps:
            raise IndexError(index)
        step = self._start_step + index
        if self._fixed:
            return step, self._fixed_batch(step)
        ids = sample_ids(step, global_batch=self._global_batch, windows=self._windows, seed=self._data.seed)
        return step, self._batch(ids[self._rows])

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        options = grain.ReadOptions(num_threads=self._data.threads, prefetch_buffer_size=self._data.prefetch)
        with closing(iter(grain.MapDataset.source(self).to_iter_dataset(options))) as batches:
            yield from batches

    def _batch(self, window_ids: np.ndarray) -> Batch:
        seq_len = self._data.seq_len
        window_BW = self._store.read(self._split, window_ids * seq_len, seq_len + 1)
        eot_id = self._store.manifest.eot_id
        return split_inputs_targets(window_BW, eot_id=eot_id, mask_documents=self._data.mask_documents)

    def _fixed_batch(self, step: int) -> Batch:
        ids = step * self._global_batch + self._rows
        batch = self._batch(np.minimum(ids, self._windows - 1))
        weights = batch.get("weights", np.ones(batch["targets"].shape, np.float32))
        return batch | {"weights": weights * (ids < self._windows).astype(np.float32)[:, None]}


def heldout_batches(
    data: TokenData,
    *,
    global_batch: int,
    rows: Rows,
    eval_windows: int | None = None,
    store: TokenStore | None = None,
) -> Batches:
    """The held-out windows in the order of the text, the same at every evaluation.

    Args:
        data: the config.
        global_batch: rows of a batch over all processes.
        rows: those of them to read here.
        eval_windows: how many windows, counted from the first; None takes all.
        store: the store if it is open already.

    Raises:
        ConfigError: the held-out split is shorter than one window.
    """
    store = open_store(data) if store is None else store
    windows = _windows(data, store, "heldout", at_most=eval_windows)
    return Batches(
        data,
        split="heldout",
        global_batch=global_batch,
        rows=rows,
        start_step=0,
        steps=-(-windows // global_batch),
        fixed=True,
        windows=windows,
        store=store,
    )


def heldout_bytes(data: TokenData, store: TokenStore, *, eval_windows: int | None = None) -> int:
    """Bytes of text that the targets of `heldout_batches` with a weight of 1 stand for.

    With the summed loss of those targets in nats, bits per byte are `loss / log(2) / heldout_bytes`.
    """
    windows = _windows(data, store, "heldout", at_most=eval_windows)
    length_V = store.tokenizer.byte_lengths()
    batches = heldout_batches(
        data, global_batch=min(64, windows), rows=slice(None), eval_windows=eval_windows, store=store
    )
    return sum(int((length_V[batch["targets"]] * batch["weights"]).sum()) for _, batch in batches)


def process_rows(sharding: jax.sharding.Sharding, global_batch: int, seq_len: int) -> np.ndarray:
    """The rows of a global batch [global_batch, seq_len] that this process's devices hold, sorted."""
    indices = sharding.addressable_devices_indices_map((global_batch, seq_len)).values()
    every_row = np.arange(global_batch)
    return np.unique(np.concatenate([every_row[index[0]] for index in indices if index is not None]))


def to_global(
    batch: Batch, shardings: Mapping[str, jax.sharding.Sharding], *, global_batch: int
) -> dict[str, jax.Array]:
    """Puts this process's rows on its devices as parts of global arrays [global_batch, seq_len].

    Args:
        batch: arrays [rows, seq_len] with the rows of `process_rows`.
        shardings: where each of them goes; more names than the batch has do no harm.
        global_batch: rows over all processes.
    """
    return {
        name: jax.make_array_from_process_local_data(shardings[name], local, (global_batch, *local.shape[1:]))
        for name, local in batch.items()
    }


class Prefetcher[T]:
    """Places batches ahead in a background thread: the next ones are on the devices when asked for.

    Iterating yields `(step, placed)`. An error in the thread is raised where the batch would have come. Leave
    it by `close`, or use it in a `with` statement.
    """

    def __init__(self, batches: Iterable[tuple[int, Batch]], place: Callable[[Batch], T], *, depth: int = 2):
        """Starts the thread.

        Args:
            batches: steps and host batches.
            place: makes device arrays of a host batch.
            depth: how many placed batches may wait; one more is in the making.
        """
        self.data_wait_s = 0.0
        """Time that the consumer has waited for batches."""
        self._queue: queue.Queue[tuple[int, T] | BaseException] = queue.Queue(depth)
        self._stop = threading.Event()
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
        self.data_wait_s += time.perf_counter() - start_s
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
            with _closing(batches):
                for step, batch in batches:
                    self._queue.put((step, place(batch)))
                    if self._stop.is_set():
                        break
        except BaseException as error:  # whatever it is belongs to the consumer
            last = error
        finally:  # without a last item the consumer would wait for ever
            self._queue.put(last)


@contextmanager
def _closing(batches: Iterator[tuple[int, Batch]]) -> Iterator[None]:
    """Closes the batches at the end if they can be: a generator then ends its own threads."""
    try:
        yield
    finally:
        close = getattr(batches, "close", None)
        if close is not None:
            close()


def _windows(data: TokenData, store: TokenStore, split: Split, *, at_most: int | None = None) -> int:
    """Windows of a split, which has at least one."""
    tokens = store.manifest.splits[split].tokens
    windows = window_count(tokens, data.seq_len)
    if not windows:
        fix = f"data.seq_len={tokens - 1} or less" if tokens > 1 else "another data.corpus.heldout_fraction"
        raise ConfigError(
            f"data.seq_len={data.seq_len}: a window needs {data.seq_len + 1} tokens, "
            f"the {split} split of {store.path} has {tokens}; use {fix}, or a larger corpus"
        )
    return windows if at_most is None else min(at_most, windows)
