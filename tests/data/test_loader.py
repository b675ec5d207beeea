"""Batches are prefetched in order, for any number of processes, into memory that is reused."""

import gc
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxinfra.data import buffers, stopwatch
from jaxinfra.data.batches import BatchLoader, validation_batches
from jaxinfra.data.mixing import MixtureSampler
from jaxinfra.data.prefetch import Prefetcher
from jaxinfra.data.stopwatch import Stopwatch
from jaxinfra.data.store.store import TokenStore
from jaxinfra.data.tokens import ConcatSamples, TokenData
from jaxinfra.errors import ConfigError, DataError
from tests.decoders import decoder
from tests.refusals import problem, raises
from tests.servers.guard import free_ports

GLOBAL_BATCH = 8
WAIT_S = 600.0
T = 16


@pytest.fixture(scope="module")
def data(store_path):
    return TokenData(store=str(store_path), seq_len=T, seed=3)


@pytest.fixture(scope="module")
def store(data):
    return data.open().store


def batches(data, store, **options):
    defaults = {"rows": slice(None), "start_step": 0, "steps": 6, "sample_ids": data.open().sample_ids}
    return BatchLoader(data, ConcatSamples(data, store, "train"), **{"global_batch": GLOBAL_BATCH} | defaults | options)


def validation(data, store, limit=None, *, global_batch=GLOBAL_BATCH, rows=slice(None)):
    samples = ConcatSamples(data, store, "validation", limit)
    return validation_batches(data, samples, global_batch=global_batch, rows=rows)


def assert_same(left, right):
    assert list(left) == list(right)
    for name in left:
        np.testing.assert_array_equal(left[name], right[name])


def loader_threads():
    return {t for t in threading.enumerate() if t.name.startswith(("grain-prefetch", "prefetch"))}


def assert_threads_end(before):
    deadline_s = time.monotonic() + 600
    while loader_threads() - before:
        assert time.monotonic() < deadline_s, loader_threads() - before
        time.sleep(0.01)


def test_rows_are_the_sequences_of_sample_ids(data, store):
    every = store.read("train", [0], store.manifest.splits["train"].tokens)[0]
    count = (len(every) - 1) // T
    for step, batch in batches(data, store):
        _, ids = MixtureSampler([count], global_batch=GLOBAL_BATCH, seed=3).sample_ids(step)
        np.testing.assert_array_equal(batch["inputs"], [every[i * T : i * T + T] for i in ids])
        np.testing.assert_array_equal(batch["targets"], [every[i * T + 1 : i * T + T + 1] for i in ids])


@pytest.mark.parametrize("start", [1, 4, 5, 6])
def test_a_run_that_starts_later_reads_the_same_batches(data, store, start):
    whole = list(batches(data, store))
    tail = list(batches(data, store, start_step=start, steps=6 - start))
    assert [step for step, _ in tail] == list(range(start, 6))
    for (_, left), (_, right) in zip(whole[start:], tail, strict=True):
        assert_same(left, right)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_rows_of_all_processes_are_the_global_batch(data, store, processes):
    rows = np.array_split(np.random.default_rng(0).permutation(GLOBAL_BATCH), processes)
    parts = [list(batches(data, store, rows=np.sort(own))) for own in rows]
    for index, (_, whole) in enumerate(batches(data, store)):
        for name, expected in whole.items():
            found = np.empty_like(expected)
            for own, part in zip(rows, parts, strict=True):
                found[np.sort(own)] = part[index][1][name]
            np.testing.assert_array_equal(found, expected)


def test_any_step_is_read_without_the_ones_before(data, store):
    far = batches(data, store, start_step=10**9, steps=10**6)
    assert len(far) == 10**6
    step, batch = far[999_999]
    assert step == 10**9 + 999_999
    assert batch["inputs"].shape == (GLOBAL_BATCH, T)
    with pytest.raises(IndexError):
        far[10**6]


def test_validation_batches_cover_the_split_once_with_equal_shapes(data, store):
    every = store.read("validation", [0], store.manifest.splits["validation"].tokens)[0]
    count = (len(every) - 1) // T
    size = next(n for n in range(7, 20) if count % n)
    found = list(validation(data, store, global_batch=size))
    assert len(found) == -(-count // size)
    assert {array.shape for _, batch in found for array in batch.values()} == {(size, T)}
    inputs = np.concatenate([batch["inputs"] for _, batch in found])
    weights = np.concatenate([batch["weights"] for _, batch in found])
    np.testing.assert_array_equal(inputs[:count].ravel(), every[: count * T])
    np.testing.assert_array_equal(weights[:count], inputs[:count] != store.manifest.tokenizer_info.eot_id)
    assert not weights[count:].any()


def test_validation_batches_stop_at_the_limit(data, store):
    few = validation(data, store, 7, global_batch=4, rows=slice(2, 4))
    weights = np.stack([batch["weights"].any(axis=1) for _, batch in few])
    assert weights.tolist() == [[True, True], [True, False]]  # rows 2, 3 of sequences 0-3 and 4-7


def test_validation_batches_have_weights_even_without_masks(data, store):
    plain = replace(data, mask_documents=False)
    (_, batch), *_ = validation(plain, store)
    assert set(batch) == {"inputs", "targets", "weights"}
    assert batch["weights"].all()


def test_validation_bytes_are_those_of_the_weighted_targets(data, store):
    tokens = store.read("validation", [0], 5 * T + 1)[0]
    targets = tokens[1:][tokens[:-1] != store.manifest.tokenizer_info.eot_id]
    expected = len(store.tokenizer.decode(targets.tolist()).encode())
    found = ConcatSamples(data, store, "validation", 5).n_bytes
    assert abs(found - expected) <= 2  # the last character may be cut, and then decodes to 3 bytes


def test_a_split_that_is_too_short_says_which_length_fits(data, store):
    tokens = store.manifest.splits["validation"].tokens
    with raises(ConfigError, f"validation {tokens}; use data.seq_len={tokens - 1}"):
        replace(data, seq_len=tokens).open().validation()
    assert len(replace(data, seq_len=tokens - 1).open().validation()) == 1
    with raises(ConfigError, "data.seq_len=1000000000 train"):
        replace(data, seq_len=10**9).open()


def test_a_small_vocabulary_of_the_model_is_refused(data, store):
    size = store.manifest.tokenizer_info.vocab_size

    def check(size):
        data.open().check(decoder(vocab_size=size, num_layers=1, hidden_size=8, num_heads=1, mlp_dim=8))

    check(size)
    with raises(ConfigError, f"model.vocab_size={size - 1} {size}"):
        check(size - 1)


@pytest.mark.parametrize("wrong", [{"store": ""}, {"seq_len": 0}, {"prefetch_bytes": 0}, {"threads": 0}])
def test_a_wrong_field_is_named(wrong):
    problem(TokenData(**{"store": "s"} | wrong), f"{next(iter(wrong))}=")


def test_damage_found_while_reading_reaches_the_consumer(data, store, monkeypatch):
    def damaged(self, split, starts, lengths):
        raise DataError("shard 3: damaged")

    before = loader_threads()
    monkeypatch.setattr(TokenStore, "read_with_mask", damaged)
    with raises(DataError, "shard 3"), Prefetcher(batches(data, store), dict) as placed:
        placed.poll(WAIT_S)
    assert_threads_end(before)


class Counted:
    """Samples of `row_bytes` each, which notes what is read and can fail."""

    def __init__(self, row_bytes, failing=None):
        self.row_bytes, self.failing, self.made = row_bytes, failing, []

    def __len__(self):
        return 10**6

    def read(self, ids, *, weighted):
        if self.failing in ids:
            raise DataError("damaged")
        self.made.append(int(ids[0]))
        return {"x": np.zeros((len(ids), self.row_bytes), np.uint8), "ids": ids}


def counted(data, samples, steps=100):
    def ids(step, global_batch):
        return np.arange(step * global_batch, (step + 1) * global_batch)

    return BatchLoader(data, samples, global_batch=2, rows=slice(None), start_step=0, steps=steps, sample_ids=ids)


@pytest.mark.parametrize(("row_bytes", "ahead"), [(10_000, 5), (10**6, 1), (0, 16)])
def test_batches_are_made_ahead_within_prefetch_bytes(row_bytes, ahead):
    samples = Counted(row_bytes)
    data = TokenData(store="none", prefetch_bytes=5 * (2 * 10_000 + 16), threads=3)
    with closing(iter(counted(data, samples))) as made:
        next(made)  # which tells how large they are
        for taken in range(2, 20):
            next(made)
            deadline_s = time.monotonic() + 600
            while len(samples.made) < taken + ahead and time.monotonic() < deadline_s:
                time.sleep(0.001)
            assert taken + ahead <= len(samples.made) <= max(data.threads + 1, taken + ahead)


def test_prefetching_fewer_batches_than_threads_does_not_warn(data, store, caplog):
    few = replace(data, threads=64, prefetch_bytes=1)
    assert [step for step, _ in batches(few, store)] == list(range(6))
    assert not caplog.records


def test_an_error_while_reading_is_raised_after_the_batches_before_it():
    data = TokenData(store="none")
    made = iter(counted(data, Counted(8, failing=11)))
    assert [next(made)[0] for _ in range(5)] == [0, 1, 2, 3, 4]
    with raises(DataError, "damaged"):
        next(made)


def all_of(placed):
    found = []
    with suppress(StopIteration):
        while True:
            found.append(placed.poll(WAIT_S))
    return found


def test_prefetching_keeps_the_order_and_ends(data, store):
    before = loader_threads()
    with Prefetcher(batches(data, store), lambda batch: batch["inputs"].sum(), depth=3) as placed:
        found = all_of(placed)
        assert all_of(placed) == []
    assert found == [(step, batch["inputs"].sum()) for step, batch in batches(data, store)]
    assert_threads_end(before)


def test_prefetching_can_be_closed_at_any_time(data, store):
    before = loader_threads()
    for taken in (0, 1, 5):
        placed = Prefetcher(batches(data, store, steps=10**6), lambda batch: batch)
        for _ in range(taken):
            placed.poll(WAIT_S)
        placed.close()
        placed.close()
        with pytest.raises(StopIteration):
            placed.poll(WAIT_S)
    assert_threads_end(before)


def test_prefetching_works_ahead():
    made = []

    def source():
        for step in range(100):
            made.append(step)
            yield step, {}

    with Prefetcher(source(), lambda batch: batch, depth=2) as placed:
        placed.poll(WAIT_S)
        deadline_s = time.monotonic() + 600
        while len(made) < 4 and time.monotonic() < deadline_s:
            time.sleep(0.01)
        time.sleep(0.05)  # for more, if there were no bound
        assert len(made) == 4  # one taken, two waiting, one that waits to be put


def test_an_error_in_the_transfer_is_raised_after_the_batches_before_it():
    def transfer(batch):
        if batch["x"] == 2:
            raise ValueError("cannot transfer")
        return batch

    placed = Prefetcher(((step, {"x": step}) for step in range(5)), transfer)
    assert [placed.poll(WAIT_S)[0], placed.poll(WAIT_S)[0]] == [0, 1]
    with pytest.raises(ValueError, match="cannot transfer"):
        placed.poll(WAIT_S)
    with pytest.raises(StopIteration):
        placed.poll(WAIT_S)


def test_an_error_while_closing_is_raised_and_ends_the_wait():
    class Source:
        def __iter__(self):
            return self

        def __next__(self):
            raise StopIteration

        def close(self):
            raise OSError("cannot close")

    placed = Prefetcher(Source(), lambda batch: batch)
    with pytest.raises(OSError, match="cannot close"):
        placed.poll(WAIT_S)


def test_a_stopwatch_sums_threads_and_stops_at_errors(monkeypatch):
    """Threads that run from 1 to 4, ended by an error, and from 2 to 7 sum to 8 seconds."""
    times_s = iter([1.0, 2.0, 4.0, 7.0])
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: next(times_s))
    watch = Stopwatch()
    one, other = watch.running(), watch.running()
    one.__enter__()
    other.__enter__()
    assert not one.__exit__(ValueError, ValueError(), None)
    other.__exit__(None, None, None)
    assert watch.total_s == 8


PROGRAM = """
import sys
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxinfra.data.prefetch import process_rows, to_global

port, rank = sys.argv[1], int(sys.argv[2])
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank, initialization_timeout=600)
whole = np.arange(8 * 6, dtype=np.int32).reshape(8, 6)
devices = np.array(jax.devices())
layouts = {
    "batch across processes": (devices.reshape(2, 2), P("fsdp", "context")),
    "sequence across processes": (devices.reshape(2, 2).T, P("fsdp", "context")),
    "rows interleaved": (devices.reshape(2, 2).T, P(("fsdp", "context"), None)),
    "replicated": (devices.reshape(2, 2), P(None, None)),
}
for name, (grid, spec) in layouts.items():
    mesh = jax.sharding.Mesh(grid, ("fsdp", "context"), axis_types=(AxisType.Explicit,) * 2)
    sharding = NamedSharding(mesh, spec)
    rows = process_rows(sharding, (8, 6))
    placed = to_global({"inputs": whole[rows]}, {"inputs": sharding}, global_batch=8)["inputs"]
    assert placed.shape == (8, 6), name
    for shard in placed.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), whole[shard.index], err_msg=name)
    print(name, rows.tolist(), flush=True)
"""


@pytest.mark.slow
def test_each_device_gets_its_part_of_the_global_batch():
    command = [sys.executable, "-c", PROGRAM, str(free_ports(1)[0])]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [subprocess.Popen([*command, str(rank)], **pipes) for rank in range(2)]
    try:
        outputs = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert "batch across processes [0, 1, 2, 3]" in outputs[0]
    assert "batch across processes [4, 5, 6, 7]" in outputs[1]
    assert "sequence across processes [0, 1, 2, 3, 4, 5, 6, 7]" in outputs[1]


SHAPE = (64, 1031)
"""No other test uses buffers of this size."""


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_arrays_are_like_those_of_numpy():
    for shape, dtype in (((3, 4), np.int32), (SHAPE, np.float32), ((70_000,), np.dtype(np.uint16)), ((0, 5), np.int8)):
        array = buffers.empty(shape, dtype)
        assert array.shape == shape
        assert array.dtype == dtype
        assert array.flags.c_contiguous
        assert array.flags.writeable
        array[...] = 3
        assert (array == 3).all()


def test_memory_is_reused_once_nothing_refers_to_it():
    array = buffers.empty(SHAPE, np.int32)
    first = address(array)
    del array
    gc.collect()
    assert address(buffers.empty(SHAPE, np.float32)) == first


@pytest.mark.parametrize(
    "keep", [lambda a: a, lambda a: a[:, 1:], lambda a: a.reshape(-1)[5:].view(np.uint8), memoryview, jax.device_put]
)
def test_memory_in_use_is_not_reused(keep):
    array = buffers.empty(SHAPE, np.int32)
    array[:] = 7
    kept = keep(array)
    before = np.asarray(kept).tobytes()
    del array
    gc.collect()
    others = [buffers.empty(SHAPE, np.int32) for _ in range(3)]
    for other in others:
        other[:] = 8
    assert np.asarray(kept).tobytes() == before


def test_many_threads_never_share_memory():
    def work(number: int) -> None:
        for _ in range(200):
            array = buffers.empty(SHAPE, np.int32)
            array[:] = number
            assert (array == number).all()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_memory_of_a_pending_computation_is_not_reused():
    """A dropped device array lives until the computations dispatched on it end."""

    @jax.jit
    def slow(x):
        busy = jax.lax.fori_loop(0, 20, lambda i, m: m @ m / 300, jax.numpy.ones((300, 300)))
        return (x + (0 * busy.sum()).astype(x.dtype)).sum()

    found = []
    for number in range(30):
        host = buffers.empty(SHAPE, np.int32)
        host[:] = number
        placed = jax.device_put(host)
        found.append(slow(placed))
        del host, placed
    assert [int(one) for one in found] == [number * SHAPE[0] * SHAPE[1] for number in range(30)]


def test_a_batch_that_is_late_is_waited_for_again():
    may_come = threading.Event()

    def transfer(batch):
        may_come.wait(WAIT_S)
        return batch

    with Prefetcher([(0, {"x": 7})], transfer) as placed:
        assert placed.poll(0.0) is None and placed.poll(0.01) is None
        may_come.set()
        assert placed.poll(WAIT_S) == (0, {"x": 7})
