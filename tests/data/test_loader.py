import threading
import time
from contextlib import closing
from dataclasses import replace

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxinfra.data.batches import Batches, heldout_batches
from jaxinfra.data.order import sample_ids
from jaxinfra.data.prefetch import Prefetcher, process_rows, to_global
from jaxinfra.data.store.store import TokenStore
from jaxinfra.data.tokens import TokenData, Windows
from jaxinfra.errors import ConfigError, DataError
from jaxinfra.models.transformer import TransformerConfig
from tests.refusals import problem, raises

GLOBAL_BATCH = 8
T = 16


@pytest.fixture(scope="module")
def data(store_path):
    return TokenData(store=str(store_path), seq_len=T, seed=3)


@pytest.fixture(scope="module")
def store(data):
    return data.open().store


def batches(data, store, **options):
    defaults = {"rows": slice(None), "start_step": 0, "steps": 6, "ids": data.open().ids}
    return Batches(data, Windows(data, store, "train"), **{"global_batch": GLOBAL_BATCH} | defaults | options)


def heldout(data, store, at_most=None, *, global_batch=GLOBAL_BATCH, rows=slice(None)):
    windows = Windows(data, store, "heldout", at_most)
    return heldout_batches(data, windows, global_batch=global_batch, rows=rows)


def assert_same(left, right):
    assert list(left) == list(right)
    for name in left:
        np.testing.assert_array_equal(left[name], right[name])


def loader_threads():
    return {t for t in threading.enumerate() if t.name.startswith(("grain-prefetch", "place-batches"))}


def assert_threads_end(before):
    deadline_s = time.monotonic() + 60
    while loader_threads() - before:
        assert time.monotonic() < deadline_s, loader_threads() - before
        time.sleep(0.01)


def test_rows_are_the_windows_of_the_order(data, store):
    every = store.read("train", [0], store.manifest.splits["train"].tokens)[0]
    windows = (len(every) - 1) // T
    for step, batch in batches(data, store):
        ids = sample_ids(step, global_batch=GLOBAL_BATCH, windows=windows, seed=3)
        np.testing.assert_array_equal(batch["inputs"], [every[i * T : i * T + T] for i in ids])
        np.testing.assert_array_equal(batch["targets"], [every[i * T + 1 : i * T + T + 1] for i in ids])


def test_every_target_is_seen_exactly_once_an_epoch(data, store):
    every = store.read("train", [0], store.manifest.splits["train"].tokens)[0]
    windows = (len(every) - 1) // T
    seen = [batch["targets"] for _, batch in batches(data, store, global_batch=1, steps=windows)]
    assert np.array_equal(np.sort(np.ravel(seen)), np.sort(every[1 : windows * T + 1]))


@pytest.mark.parametrize("start", [1, 4, 5, 6])
def test_a_run_that_starts_later_reads_the_same_tail(data, store, start):
    whole = list(batches(data, store))
    tail = list(batches(data, store, start_step=start, steps=6 - start))
    assert [step for step, _ in tail] == list(range(start, 6))
    for (_, left), (_, right) in zip(whole[start:], tail, strict=True):
        assert_same(left, right)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_rows_of_all_processes_make_up_the_same_batch(data, store, processes):
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


def test_heldout_batches_cover_the_windows_once_with_equal_shapes(data, store):
    every = store.read("heldout", [0], store.manifest.splits["heldout"].tokens)[0]
    windows = (len(every) - 1) // T
    size = next(n for n in range(7, 20) if windows % n)
    found = list(heldout(data, store, global_batch=size))
    assert len(found) == -(-windows // size)
    assert {array.shape for _, batch in found for array in batch.values()} == {(size, T)}
    inputs = np.concatenate([batch["inputs"] for _, batch in found])
    weights = np.concatenate([batch["weights"] for _, batch in found])
    np.testing.assert_array_equal(inputs[:windows].ravel(), every[: windows * T])
    np.testing.assert_array_equal(weights[:windows], inputs[:windows] != store.manifest.words.eot_id)
    assert not weights[windows:].any()


def test_heldout_batches_stop_at_the_windows_asked_for(data, store):
    few = heldout(data, store, 7, global_batch=4, rows=slice(2, 4))
    weights = np.stack([batch["weights"].any(axis=1) for _, batch in few])
    assert weights.tolist() == [[True, True], [True, False]]  # rows 2, 3 of windows 0-3 and 4-7


def test_heldout_batches_have_weights_even_without_masks(data, store):
    plain = replace(data, mask_documents=False)
    (_, batch), *_ = heldout(plain, store)
    assert set(batch) == {"inputs", "targets", "weights"}
    assert batch["weights"].all()


def test_heldout_bytes_are_those_of_the_weighted_targets(data, store):
    tokens = store.read("heldout", [0], 5 * T + 1)[0]
    targets = [int(b) for a, b in zip(tokens[:-1], tokens[1:], strict=True) if a != store.manifest.words.eot_id]
    expected = len(store.tokenizer.decode(targets).encode())
    found = Windows(data, store, "heldout", 5).n_bytes
    assert abs(found - expected) <= 2  # the last character may be cut, and then decodes to 3 bytes


def test_a_split_that_is_too_short_says_which_length_fits(data, store):
    tokens = store.manifest.splits["heldout"].tokens
    with raises(ConfigError, f"heldout {tokens}; use data.seq_len={tokens - 1}"):
        replace(data, seq_len=tokens).open().heldout()
    assert len(replace(data, seq_len=tokens - 1).open().heldout()) == 1
    with raises(ConfigError, "data.seq_len=1000000000 train"):
        replace(data, seq_len=10**9).open()


def test_a_small_vocabulary_of_the_model_is_refused(data, store):
    size = store.manifest.words.vocab_size

    def check(size):
        data.open().check(TransformerConfig(vocab_size=size, layers=1, width=8, heads=1, mlp_dim=8))

    check(size)
    with raises(ConfigError, f"model.vocab_size={size - 1} {size}"):
        check(size - 1)


@pytest.mark.parametrize("wrong", [{"store": ""}, {"seq_len": 0}, {"prefetch_bytes": 0}, {"threads": 0}])
def test_a_wrong_field_is_named(wrong):
    problem(TokenData(**{"store": "s"} | wrong), f"{next(iter(wrong))}=")


def test_damage_met_while_reading_reaches_the_consumer(data, store, monkeypatch):
    def damaged(self, split, starts, length):
        raise DataError("shard 3: damaged")

    before = loader_threads()
    monkeypatch.setattr(TokenStore, "read", damaged)
    with pytest.raises(DataError, match="shard 3"), Prefetcher(batches(data, store), dict) as placed:
        next(placed)
    assert_threads_end(before)


def test_global_arrays_hold_the_batch(data, store):
    sharding = NamedSharding(jax.make_mesh((1,), ("fsdp",)), P("fsdp"))
    assert process_rows(sharding, (GLOBAL_BATCH, T)).tolist() == list(range(GLOBAL_BATCH))
    _, batch = batches(data, store)[0]
    placed = to_global(batch, dict.fromkeys(batch, sharding), global_batch=GLOBAL_BATCH)
    assert_same({name: np.asarray(array) for name, array in placed.items()}, batch)
    assert all(array.sharding == sharding for array in placed.values())


class Counted:
    """Batches of so many bytes a row; those that were made are noted, and one may fail."""

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

    return Batches(data, samples, global_batch=2, rows=slice(None), start_step=0, steps=steps, ids=ids)


@pytest.mark.parametrize(("row_bytes", "ahead"), [(10_000, 5), (10**6, 1), (0, 16)])
def test_batches_are_made_ahead_in_so_many_bytes(row_bytes, ahead):
    samples = Counted(row_bytes)
    data = TokenData(store="none", prefetch_bytes=5 * (2 * 10_000 + 16), threads=3)
    with closing(iter(counted(data, samples))) as made:
        next(made)  # which tells how large they are
        for taken in range(2, 20):
            next(made)
            deadline_s = time.monotonic() + 60
            while len(samples.made) < taken + ahead and time.monotonic() < deadline_s:
                time.sleep(0.001)
            assert taken + ahead <= len(samples.made) <= max(data.threads + 1, taken + ahead)


def test_fewer_batches_than_threads_are_made_ahead_without_a_word(data, store, caplog):
    few = replace(data, threads=64, prefetch_bytes=1)
    assert [step for step, _ in batches(few, store)] == list(range(6))
    assert not caplog.records


def test_an_error_while_reading_is_raised_after_the_batches_before_it():
    data = TokenData(store="none")
    made = iter(counted(data, Counted(8, failing=11)))
    assert [next(made)[0] for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(DataError, match="damaged"):
        next(made)


def test_prefetching_keeps_the_order_and_ends(data, store):
    before = loader_threads()
    with Prefetcher(batches(data, store), lambda batch: batch["inputs"].sum(), depth=3) as placed:
        found = list(placed)
        assert list(placed) == []
    assert found == [(step, batch["inputs"].sum()) for step, batch in batches(data, store)]
    assert_threads_end(before)


def test_prefetching_can_be_left_at_any_time(data, store):
    before = loader_threads()
    for taken in (0, 1, 5):
        placed = Prefetcher(batches(data, store, steps=10**6), lambda batch: batch)
        for _ in range(taken):
            next(placed)
        placed.close()
        placed.close()
        with pytest.raises(StopIteration):
            next(placed)
    assert_threads_end(before)


def test_prefetching_works_ahead():
    made = []

    def source():
        for step in range(100):
            made.append(step)
            yield step, {}

    with Prefetcher(source(), lambda batch: batch, depth=2) as placed:
        next(placed)
        deadline_s = time.monotonic() + 60
        while len(made) < 4 and time.monotonic() < deadline_s:
            time.sleep(0.01)
        time.sleep(0.05)  # for more, if there were no bound
        assert len(made) == 4  # one taken, two waiting, one that waits to be put


def test_an_error_while_placing_is_raised_after_the_batches_before_it():
    def place(batch):
        if batch["x"] == 2:
            raise ValueError("cannot place")
        return batch

    placed = Prefetcher(((step, {"x": step}) for step in range(5)), place)
    assert [next(placed)[0], next(placed)[0]] == [0, 1]
    with pytest.raises(ValueError, match="cannot place"):
        next(placed)
    with pytest.raises(StopIteration):
        next(placed)


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
        next(placed)
