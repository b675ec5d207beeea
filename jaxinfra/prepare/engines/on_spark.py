"""Spark engine: each job is a Spark job of one task, so that its result arrives when it is done.

Jobs run on the active context of this process, on the server of `SPARK_REMOTE`, on the master of `MASTER`, or on a
local master that listens on the loopback interface and ends with the jobs.
"""

import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from jaxinfra.errors import ConfigError
from jaxinfra.packages import import_optional
from jaxinfra.prepare.engines.engine import ONE_THREAD, Engine, JobResult, available_cores, driver_python_path, run_job

if TYPE_CHECKING:
    from pyspark import RDD, SparkContext

_TRIES = 2
_CANCEL_S = 0.5  # between two requests to cancel all jobs
_LOOPBACK = {"spark.driver.host": "127.0.0.1", "spark.driver.bindAddress": "127.0.0.1"}
_QUIET = {"spark.ui.enabled": "false", "spark.ui.showConsoleProgress": "false", "spark.log.level": "OFF"}


@dataclass(frozen=True, kw_only=True)
class _Spark:
    """A Spark context or session that was found or started."""

    # Makes a Spark job of a function and its argument; calling the Spark job runs it, and blocks until it is done.
    make_spark_job: Callable[[Callable[[Any], JobResult], Any], Callable[[], JobResult]]
    cancel: Callable[[], object]  # cancels all running jobs
    parallelism: int  # tasks that run at once


@contextmanager
def start_spark(workers: int | None) -> Iterator[Engine]:
    """Finds or starts Spark, and ends what it started with the context."""
    pyspark = import_optional("pyspark", needed_by="engine=spark", install="jaxinfra[spark]")
    if os.environ.get("SPARK_REMOTE"):
        connection = _connect_remote()
    elif pyspark.SparkContext._active_spark_context:
        connection = nullcontext(_use_context(pyspark.SparkContext._active_spark_context))
    else:
        connection = _start_context(pyspark, workers)
    with connection as spark:
        limit = workers or max(1, spark.parallelism)
        with ThreadPoolExecutor(limit, thread_name_prefix="spark") as threads:
            waiting: set[Future[JobResult]] = set()

            def submit[J](function: Callable[[J], object], job: J) -> Future[JobResult]:
                with _ignore_pandas_warning():
                    result = threads.submit(spark.make_spark_job(partial(run_job, function), job))
                waiting.add(result)
                result.add_done_callback(waiting.discard)
                return result

            try:
                yield Engine(submit=submit, workers=limit)
            finally:
                threads.shutdown(wait=False, cancel_futures=True)
                while waiting:  # again, for a job that was on its way to Spark
                    spark.cancel()
                    wait([*waiting], _CANCEL_S)


def _ignore_pandas_warning() -> AbstractContextManager[object]:
    """Hides Spark's warning about pandas versions that it does not support, given even if pandas is not used."""
    return warnings.catch_warnings(action="ignore", category=FutureWarning)


def _use_context(context: "SparkContext") -> _Spark:
    """Runs jobs on a SparkContext of this process."""
    tag = f"jaxinfra-{uuid4()}"

    def collect(rows: "RDD[JobResult]") -> JobResult:
        context.addJobTag(tag)  # tags are set per thread
        return rows.collect()[0]

    def make_spark_job[J](function: Callable[[J], JobResult], job: J) -> Callable[[], JobResult]:
        return partial(collect, context.parallelize([job], 1).map(function))

    cancel = partial(context.cancelJobsWithTag, tag)
    return _Spark(make_spark_job=make_spark_job, cancel=cancel, parallelism=context.defaultParallelism)


@contextmanager
def _start_context(pyspark: ModuleType, workers: int | None) -> Iterator[_Spark]:
    master = os.environ.get("MASTER") or f"local[{workers or '*'},{_TRIES}]"
    settings = _QUIET | {"spark.master": master, "spark.app.name": "jaxinfra", "spark.task.maxFailures": str(_TRIES)}
    settings |= _LOOPBACK if master.startswith("local") else {}
    environment = ONE_THREAD | {"PYTHONPATH": driver_python_path()}
    settings |= {f"spark.executorEnv.{name}": value for name, value in environment.items()}
    conf = pyspark.SparkConf().setAll(list(settings.items()))
    gateway = _start_jvm(conf)
    try:
        with _ignore_pandas_warning():
            context = pyspark.SparkContext(gateway=gateway, conf=conf)
        context.pythonExec = os.environ.get("PYSPARK_PYTHON", sys.executable)
        try:
            yield _use_context(context)
        finally:
            context.stop()
    finally:
        gateway.shutdown()
        gateway.proc.stdin.close()  # the JVM exits when its standard input closes
        gateway.proc.wait()
        pyspark.SparkContext._gateway = pyspark.SparkContext._jvm = None


def _start_jvm(conf: object) -> Any:
    """Starts the JVM with its output hidden."""
    home = os.environ.get("JAVA_HOME")
    if not shutil.which(os.path.join(home, "bin", "java") if home else "java"):
        raise ConfigError("engine=spark: Java is not installed; install Java 17 or later, or set JAVA_HOME")
    java_gateway = import_optional("pyspark.java_gateway", needed_by="engine=spark", install="jaxinfra[spark]")
    with tempfile.TemporaryFile() as errors:
        try:
            return java_gateway.launch_gateway(conf, popen_kwargs={"stdout": subprocess.DEVNULL, "stderr": errors})
        except Exception as error:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
            cause = lines[-1] if lines else str(error)
            raise ConfigError(f"engine=spark: does not start ({cause}); check JAVA_HOME and SPARK_HOME") from error


@contextmanager
def _connect_remote() -> Iterator[_Spark]:
    """Runs jobs on a Spark Connect server. It has no RDDs, so a job is a function that maps a table of one row."""
    sql = import_optional("pyspark.sql", needed_by="engine=spark with SPARK_REMOTE", install="pyspark[connect]")
    with _ignore_pandas_warning():
        session = sql.SparkSession.builder.getOrCreate()

    def make_spark_job[J](function: Callable[[J], JobResult], job: J) -> Callable[[], JobResult]:
        table = session.range(0, 1, 1, 1).mapInArrow(partial(_run_in_arrow, function, job), "result binary")
        return lambda: pickle.loads(table.collect()[0][0])

    yield _Spark(make_spark_job=make_spark_job, cancel=session.interruptAll, parallelism=available_cores())


def _run_in_arrow[J](function: Callable[[J], JobResult], job: J, batches: Iterator[object]) -> Iterator[object]:
    import pyarrow

    for _ in batches:
        yield pyarrow.RecordBatch.from_pydict({"result": [pickle.dumps(function(job))]})
