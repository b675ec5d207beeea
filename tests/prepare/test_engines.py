import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from jaxinfra.errors import ConfigError, DataError
from jaxinfra.prepare.engines import run_jobs
from tests.prepare import engine_jobs
from tests.prepare.engine_jobs import Job, start_driver
from tests.refusals import raises
from tests.tiny_run import is_running

JOBS = [Job(number=number) for number in range(7)]


def results(engine, function, jobs, workers):
    found = []
    run_jobs(engine, function, jobs, workers=workers, on_result=found.append)
    return sorted(found)


def children():
    return {child.pid for child in psutil.Process().children(recursive=True)}


@pytest.fixture(autouse=True)
def nothing_is_left():
    before = children()
    yield
    left = [psutil.Process(pid).cmdline() for pid in children() - before]
    assert not [line for line in left if "multiprocessing.resource_tracker" not in " ".join(line)]


@pytest.mark.parametrize("workers", [1, 2, 3, 20, None])
def test_every_job_runs_once_with_any_number_of_workers(workers):
    assert results("local", engine_jobs.square, JOBS, workers) == [(number, number**2) for number in range(7)]
    assert results("local", engine_jobs.square, [], workers) == []


def test_one_worker_is_this_process_and_more_are_single_threaded_processes():
    assert {pid for pid, _ in results("local", engine_jobs.process_of, JOBS[:2], 1)} == {os.getpid()}
    assert {pid for pid, _ in results("local", engine_jobs.process_of, JOBS[:1], 4)} == {os.getpid()}
    found = results("local", engine_jobs.process_of, JOBS[:4], 2)
    assert len({pid for pid, _ in found} - {os.getpid()}) == 2
    assert {threads for _, threads in found} == {"1"}


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_a_job_is_raised_unchanged_and_ends_the_others(workers, tmp_path):
    found = []
    with raises(DataError, "shard 3: damaged") as error:
        run_jobs("local", engine_jobs.fail, JOBS, workers=workers, on_result=found.append)
    assert set(found) <= {0, 1, 2}  # those after the third would take long
    if workers > 1:
        assert "engine_jobs.py" in str(error.value.__cause__)  # the traceback in the worker


def test_an_error_that_cannot_be_pickled_is_described():
    for job, named in ((engine_jobs.fail_oddly, "Odd: one and two"), (engine_jobs.give_a_lambda, "pickled")):
        with raises(RuntimeError, named):
            results("local", job, JOBS, 2)


def test_an_error_of_the_driver_ends_the_workers(tmp_path):
    def stop(result):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_jobs("local", engine_jobs.square, JOBS, workers=2, on_result=stop)


def test_a_job_whose_worker_died_runs_again(tmp_path):
    jobs = [Job(number=number, folder=str(tmp_path)) for number in range(5)]
    assert results("local", engine_jobs.die_once, jobs, 2) == list(range(5))
    assert (tmp_path / "died").exists()


def test_a_job_that_kills_its_workers_is_an_error():
    for job, named in ((engine_jobs.die, "SIGKILL"), (engine_jobs.end, "exit code 3")):
        with raises(ConfigError, f"workers=2: {named} twice"):
            results("local", job, JOBS, 2)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_workers_end_with_their_driver(name, tmp_path):
    driver, pids = start_driver(tmp_path, 2)
    driver.send_signal(getattr(signal, name))
    _, errors = driver.communicate(timeout=600)
    assert driver.returncode != 0
    assert errors.count("Traceback") == (1 if name == "SIGINT" else 0)  # of the driver alone
    deadline = time.monotonic() + 600
    while alive := [pid for pid in pids if is_running(pid)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("engine", "workers", "package", "named"),
    [
        ("local", 0, None, "workers=0: 1"),
        ("ray", 2, "ray", "engine=ray: jaxinfra[ray]"),
        ("dask", 2, "distributed", "engine=dask: distributed jaxinfra[dask]"),
        ("spark", 2, "pyspark", "engine=spark: pyspark jaxinfra[spark]"),
        ("spark", 2, None, "engine=spark: Java install"),
    ],
)
def test_an_engine_that_cannot_start_is_refused(engine, workers, package, named, monkeypatch):
    monkeypatch.setenv("JAVA_HOME", "/nowhere")
    if package:
        monkeypatch.setitem(sys.modules, package, None)
    with raises(ConfigError, named):
        results(engine, engine_jobs.square, JOBS, workers)


CLUSTER = """
import os
import signal
import sys
from jaxinfra.prepare.engines import run_jobs
from jaxinfra.errors import ConfigError, DataError
from tests.prepare import engine_jobs
from tests.prepare.engine_jobs import Job, outside_of_loopback

if __name__ == "__main__":  # Dask imports this module in its workers
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores Ctrl-C
    jobs = [Job(number=number, folder=sys.argv[2]) for number in range(8)]
    found = []

    def done(result):
        found.append(result)
        if "SPARK_REMOTE" not in os.environ:  # whose server is another's
            assert not outside_of_loopback(), outside_of_loopback()

    try:
        run_jobs(sys.argv[1], engine_jobs.die_once_and_fail_last, jobs, workers=2, on_result=done)
    except DataError as error:
        assert str(error) == "shard 6: is damaged"
        assert len(found) == len(set(found)), found
        assert len(set(range(6)) - set(found)) <= 1, found  # one may have run when the last one failed
        print("same")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    try:
        if sys.argv[1] == "dask":
            run_jobs(sys.argv[1], engine_jobs.die, jobs, workers=2, on_result=lambda result: None)
    except ConfigError as error:
        print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ray", "dask", "spark", "connect"])
def test_clusters_behave_like_the_local_engine(name, tmp_path):
    """Runs in a process of its own, because these engines leave threads behind."""
    (tmp_path / "driver.py").write_text(CLUSTER)
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    engine = name
    if name == "connect":
        engine = "spark"
        environment |= {"SPARK_REMOTE": "local[2,2]", "PYSPARK_PYTHON": sys.executable}
    command = [sys.executable, str(tmp_path / "driver.py"), engine, str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "again").exists()  # the job whose worker died was done by another
    said = [line for line in result.stdout.splitlines() if "(raylet)" not in line and line]  # of the worker that died
    assert said[0] == "same"
    assert [line.partition(":")[2][:32] for line in said[1:]] == [" a job was not run (KilledWorker"] * (name == "dask")
    assert result.stderr == "" or name == "connect"  # whose server writes to it
