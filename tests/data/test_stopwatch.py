from jaxinfra.data import stopwatch
from jaxinfra.data.stopwatch import Stopwatch, lateness
from tests.refusals import names

REMEDIES = {"reading": "read less", "decoding": "decode less"}


def test_threads_count_severally_and_errors_end_the_count(monkeypatch):
    """Two that run from 1 to 4 and from 2 to 7, the first by an error, are 8 seconds of work."""
    times_s = iter([1.0, 2.0, 4.0, 7.0])
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: next(times_s))
    watch = Stopwatch()
    one, other = watch.running(), watch.running()
    one.__enter__()
    other.__enter__()
    assert not one.__exit__(ValueError, ValueError(), None)
    other.__exit__(None, None, None)
    assert watch.total_s == 8


def test_a_run_that_hardly_waits_says_nothing():
    assert lateness(5.0, 100.0, {"reading": 50.0, "decoding": 1.0}, REMEDIES) is None


def test_the_slowest_stage_is_named():
    found = lateness(20.0, 100.0, {"reading": 5.0, "decoding": 50.0}, REMEDIES)
    names(found or "", "20.0 100.0 decoding is reading 5.0 decode less")
