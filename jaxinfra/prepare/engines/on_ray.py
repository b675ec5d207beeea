"""The Ray engine: tasks on the cluster of `RAY_ADDRESS`, or on a Ray of this machine that lives as long as the jobs."""

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from jaxinfra.packages import import_optional
from jaxinfra.prepare.engines.call import Engine, Outcome, call, python_path

_STORE_BYTES = 128 << 20  # results of jobs are small: what they make is written to files
# Ray listens on the loopback interface if told that this machine cannot be in a cluster. It reads that on import.
_ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}


@contextmanager
def started(workers: int | None) -> Iterator[Engine]:
    """Connects to Ray, or starts one, and leaves or ends it with the context."""
    own = {} if os.environ.get("RAY_ADDRESS") else _ALONE | {"PYTHONPATH": python_path()}
    with _environment(own):
        ray = import_optional("ray", needed_by="engine=ray", install="jaxinfra[ray]")
        with _connected(ray, workers):
            task = ray.remote(num_cpus=1, max_retries=1)(call)
            running: dict[Future[Outcome], Any] = {}

            def submit(function: Callable[[Any], Any], job: Any) -> Future[Outcome]:
                reference = task.remote(function, job)
                future = reference.future()
                running[future] = reference
                future.add_done_callback(lambda ended: running.pop(ended, None))
                return future

            try:
                yield Engine(submit=submit, workers=workers or max(1, int(ray.cluster_resources().get("CPU", 1))))
            finally:
                for reference in list(running.values()):
                    ray.cancel(reference, force=True)


@contextmanager
def _connected(ray: Any, workers: int | None) -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        own = dict(num_cpus=workers, include_dashboard=False, object_store_memory=_STORE_BYTES, _temp_dir=folder)
        own = {} if os.environ.get("RAY_ADDRESS") else own
        ray.init(logging_level=logging.ERROR, log_to_driver=False, **own)
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Sets variables for the processes that are started meanwhile."""
    before = {name: os.environ[name] for name in values if name in os.environ}
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            del os.environ[name]
        os.environ.update(before)
