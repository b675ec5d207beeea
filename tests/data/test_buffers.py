import gc
import threading

import jax
import numpy as np
import pytest

from jaxinfra.data import buffers

SHAPE = (64, 1031)
"""Of no other test: nobody else takes or leaves memory of this size."""


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


def test_memory_is_used_again_once_nothing_refers_to_it():
    array = buffers.empty(SHAPE, np.int32)
    first = address(array)
    del array
    gc.collect()
    assert address(buffers.empty(SHAPE, np.float32)) == first


@pytest.mark.parametrize(
    "keep", [lambda a: a, lambda a: a[:, 1:], lambda a: a.reshape(-1)[5:].view(np.uint8), memoryview]
)
def test_memory_that_something_refers_to_is_left_alone(keep):
    array = buffers.empty(SHAPE, np.int32)
    array[:] = 7
    kept = keep(array)
    before = memoryview(kept).tobytes()
    del array
    gc.collect()
    others = [buffers.empty(SHAPE, np.int32) for _ in range(3)]
    for other in others:
        other[:] = 8
    assert memoryview(kept).tobytes() == before


def test_device_arrays_keep_what_they_were_made_of():
    host = buffers.empty(SHAPE, np.int32)
    host[:] = 7
    placed = jax.device_put(host)
    del host
    gc.collect()
    others = [buffers.empty(SHAPE, np.int32) for _ in range(3)]
    for other in others:
        other[:] = 8
    assert (np.asarray(placed) == 7).all()


def test_many_threads_never_share_memory():
    wrong = []

    def work(number: int) -> None:
        for _ in range(200):
            array = buffers.empty(SHAPE, np.int32)
            array[:] = number
            if not (array == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_memory_that_a_computation_has_yet_to_read_is_left_alone():
    """A dropped device array lives until what was dispatched on it is done."""

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
