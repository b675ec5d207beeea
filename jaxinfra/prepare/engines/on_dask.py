"""The Dask engine: tasks on the cluster of `DASK_SCHEDULER_ADDRESS`, or on one of this machine for these jobs alone."""

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from jaxinfra.packages import import_optional
from jaxinfra.prepare.engines.call import ONE_THREAD, Engine, call, python_path


@contextmanager
def started(workers: int | None) -> Iterator[Engine]:
    """Connects to a scheduler, or starts one, and leaves or ends it with the context."""
    distributed = import_optional("distributed", needed_by="engine=dask", install="jaxinfra[dask]")
    address = os.environ.get("DASK_SCHEDULER_ADDRESS")
    with nullcontext(address) if address else _scheduler(distributed, workers) as scheduler:
        client = distributed.Client(scheduler)
        try:
            submit = partial(client.get_executor(pure=False).submit, call)
            yield Engine(submit=submit, workers=workers or max(1, sum(client.nthreads().values())))
        finally:
            client.close()


@contextmanager
def _scheduler(distributed: Any, workers: int | None) -> Iterator[Any]:
    dask = import_optional("dask", needed_by="engine=dask", install="jaxinfra[dask]")
    settings = {"distributed.scheduler.allowed-failures": 1, "distributed.comm.retry.count": 3}
    with (
        tempfile.TemporaryDirectory(prefix="dask-", ignore_cleanup_errors=True) as folder,
        dask.config.set(settings),
        distributed.LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",  # of the scheduler's HTTP server, which there always is
            scheduler_kwargs={"dashboard": False},
            worker_dashboard_address=None,
            silence_logs=logging.CRITICAL,
            memory_limit=0,  # none: the kernel's is enough
            local_directory=folder,
            env=ONE_THREAD | {"PYTHONPATH": python_path()},
        ) as cluster,
    ):
        yield cluster
