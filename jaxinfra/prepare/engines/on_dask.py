"""Dask engine: tasks on the cluster of `DASK_SCHEDULER_ADDRESS`, or on a local one that ends with the jobs."""

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from types import ModuleType

from jaxinfra.packages import import_optional
from jaxinfra.prepare.engines.engine import ONE_THREAD, Engine, driver_python_path, run_job


@contextmanager
def start_dask(workers: int | None) -> Iterator[Engine]:
    """Connects to a scheduler or starts one, and disconnects or ends it with the context."""
    distributed = import_optional("distributed", needed_by="engine=dask", install="jaxinfra[dask]")
    address = os.environ.get("DASK_SCHEDULER_ADDRESS")
    found = nullcontext(address) if address else _start_cluster(distributed, workers)
    with found as scheduler, distributed.Client(scheduler) as client:
        executor = client.get_executor(pure=False)  # otherwise Dask reuses the result of an equal job
        cores = sum(client.nthreads().values())
        yield Engine(submit=partial(executor.submit, run_job), workers=workers or max(1, cores))


@contextmanager
def _start_cluster(distributed: ModuleType, workers: int | None) -> Iterator[object]:
    dask = import_optional("dask", needed_by="engine=dask", install="jaxinfra[dask]")
    settings = {"distributed.scheduler.allowed-failures": 1, "distributed.comm.retry.count": 3}
    with (
        tempfile.TemporaryDirectory(prefix="dask-", ignore_cleanup_errors=True) as folder,
        dask.config.set(settings),
        distributed.LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",  # the scheduler always starts an HTTP server
            scheduler_kwargs={"dashboard": False},
            worker_dashboard_address=None,
            silence_logs=logging.CRITICAL,
            memory_limit=0,  # no limit but the kernel's
            local_directory=folder,
            env=ONE_THREAD | {"PYTHONPATH": driver_python_path()},
        ) as cluster,
    ):
        yield cluster
