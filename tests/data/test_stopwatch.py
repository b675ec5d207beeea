import threading
import time

import pytest

from jaxinfra.data.stopwatch import Stopwatch, lateness

REMEDIES = {"reading": "read less", "decoding": "decode less"}


def test_threads_count_severally():
    watch, both = Stopwatch(), threading.Barrier(2)

    def work():
        with watch.running():
            both.wait(timeout=10)
            time.sleep(0.05)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert watch.total_s >= 0.1


def test_time_counts_that_ends_in_an_error():
    watch = Stopwatch()
    with pytest.raises(ValueError), watch.running():
        time.sleep(0.01)
        raise ValueError
    assert watch.total_s >= 0.01


def test_a_run_that_hardly_waits_says_nothing():
    assert lateness(5.0, 100.0, {"reading": 50.0, "decoding": 1.0}, REMEDIES) is None


def test_the_slowest_stage_is_named():
    assert lateness(20.0, 100.0, {"reading": 5.0, "decoding": 50.0}, REMEDIES) == (
        "data was late: waited 20.0 s of 100.0 s (20%) for batches; decoding is the slow stage "
        "(reading 5.0 s, decoding 50.0 s); decode less"
    )
