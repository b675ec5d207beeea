"""The Spark engine: every job is a Spark job of one task, so that each result comes when it is there.

Jobs go to the context of this process, to the server of `SPARK_REMOTE`, to the master of `MASTER`, or to a local
master that listens on the loopback interface and ends with the jobs.
"""

import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import uuid4

from jaxinfra.errors import ConfigError
from jaxinfra.packages import import_optional
from jaxinfra.prepare.engines.call import ONE_THREAD, Engine, Outcome, call, cores, python_path

_TRIES = 2
_LOOPBACK = {"spark.driver.host": "127.0.0.1", "spark.driver.bindAddress": "127.0.0.1"}
_QUIET = {"spark.ui.enabled": "false", "spark.ui.showConsoleProgress": "false", "spark.log.level": "OFF"}


@dataclass(frozen=True, kw_only=True)
class _Spark:
    """Spark as it was found or started.

    Attributes:
        prepare: of a function and a job, what runs it as a Spark job in a thread of its own.
        cancel: gives up all that run.
        parallelism: tasks that it runs at once.
    """

    prepare: Callable[[Callable[[Any], Outcome], Any], Callable[[], Outcome]]
    cancel: Callable[[], object]
    parallelism: int


@contextmanager
def started(workers: int | None) -> Iterator[Engine]:
    """Takes or starts Spark, and ends what it started with the context."""
    pyspark = import_optional("pyspark", needed_by="engine=spark", install="jaxinfra[spark]")
    if os.environ.get("SPARK_REMOTE"):
        opened = _remote()
    elif pyspark.SparkContext._active_spark_context:
        opened = nullcontext(_of(pyspark.SparkContext._active_spark_context))
    else:
        opened = _own(pyspark, workers)
    with opened as spark:
        most = workers or max(1, spark.parallelism)
        with ThreadPoolExecutor(most, thread_name_prefix="spark") as threads:

            def submit(function: Callable[[Any], Any], job: Any) -> Future[Outcome]:
                with _no_word_of_pandas():
                    return threads.submit(spark.prepare(partial(call, function), job))

            try:
                yield Engine(submit=submit, workers=most)
            finally:
                spark.cancel()  # or the threads would wait for their jobs


@contextmanager
def _no_word_of_pandas() -> Iterator[None]:
    """Spark warns of a pandas that it does not support yet, also where none is used."""
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        yield


def _of(context: Any) -> _Spark:
    """Jobs of a context of this process."""
    tag = f"jaxinfra-{uuid4()}"

    def collect(rows: Any) -> Outcome:
        context.addJobTag(tag)  # of this thread
        return rows.collect()[0]

    def prepare(function: Callable[[Any], Outcome], job: Any) -> Callable[[], Outcome]:
        return partial(collect, context.parallelize([job], 1).map(function))

    return _Spark(
        prepare=prepare, cancel=partial(context.cancelJobsWithTag, tag), parallelism=context.defaultParallelism
    )


@contextmanager
def _own(pyspark: Any, workers: int | None) -> Iterator[_Spark]:
    master = os.environ.get("MASTER") or f"local[{workers or '*'},{_TRIES}]"
    settings = _QUIET | {"spark.master": master, "spark.app.name": "jaxinfra", "spark.task.maxFailures": str(_TRIES)}
    settings |= _LOOPBACK if master.startswith("local") else {}
    environment = ONE_THREAD | {"PYTHONPATH": python_path()}
    settings |= {f"spark.executorEnv.{name}": value for name, value in environment.items()}
    conf = pyspark.SparkConf().setAll(list(settings.items()))
    gateway = _gateway(conf)
    try:
        with _no_word_of_pandas():
            context = pyspark.SparkContext(gateway=gateway, conf=conf)
        context.pythonExec = os.environ.get("PYSPARK_PYTHON", sys.executable)
        try:
            yield _of(context)
        finally:
            context.stop()
    finally:
        gateway.shutdown()
        gateway.proc.stdin.close()  # the JVM ends when nobody can speak to it
        gateway.proc.wait()
        pyspark.SparkContext._gateway = pyspark.SparkContext._jvm = None


def _gateway(conf: Any) -> Any:
    """Starts the JVM, which would write to the terminal."""
    home = os.environ.get("JAVA_HOME")
    if not shutil.which(os.path.join(home, "bin", "java") if home else "java"):
        raise ConfigError("engine=spark: there is no Java; install Java 17 or later, or set JAVA_HOME")
    java_gateway = import_optional("pyspark.java_gateway", needed_by="engine=spark", install="jaxinfra[spark]")
    with tempfile.TemporaryFile() as errors:
        try:
            return java_gateway.launch_gateway(conf, popen_kwargs={"stdout": subprocess.DEVNULL, "stderr": errors})
        except Exception as error:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
            cause = lines[-1] if lines else str(error)
            raise ConfigError(f"engine=spark: does not start ({cause}); look at JAVA_HOME and SPARK_HOME") from error


@contextmanager
def _remote() -> Iterator[_Spark]:
    """Jobs of a Spark Connect server, which has no contexts: they come as functions of tables of one row."""
    sql = import_optional("pyspark.sql", needed_by="engine=spark with SPARK_REMOTE", install="pyspark[connect]")
    with _no_word_of_pandas():
        session = sql.SparkSession.builder.getOrCreate()

    def prepare(function: Callable[[Any], Outcome], job: Any) -> Callable[[], Outcome]:
        table = session.range(0, 1, 1, 1).mapInArrow(partial(_rows, function, job), "outcome binary")
        return lambda: pickle.loads(table.collect()[0][0])

    yield _Spark(prepare=prepare, cancel=session.interruptAll, parallelism=cores())


def _rows(function: Callable[[Any], Outcome], job: Any, batches: Iterator[Any]) -> Iterator[Any]:
    import pyarrow

    for _ in batches:
        yield pyarrow.RecordBatch.from_pydict({"outcome": [pickle.dumps(function(job))]})
