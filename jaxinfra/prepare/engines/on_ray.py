"""Ray engine: tasks on the cluster of `RAY_ADDRESS`, or on a local Ray that ends with the jobs."""

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from types import ModuleType

from jaxinfra.packages import import_optional
from jaxinfra.prepare.engines.engine import Engine, JobResult, driver_python_path, run_job

_OBJECT_STORE_BYTES = 128 << 20  # results are small, because jobs write their data to files
# Ray reads these on import. The first makes it listen on the loopback interface only.
_LOCAL = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}


@contextmanager
def start_ray(workers: int | None) -> Iterator[Engine]:
    """Connects to Ray or starts it, and disconnects or ends it with the context."""
    variables = {} if os.environ.get("RAY_ADDRESS") else _LOCAL | {"PYTHONPATH": driver_python_path()}
    with _environment(variables):
        ray = import_optional("ray", needed_by="engine=ray", install="jaxinfra[ray]")
        with nullcontext() if ray.is_initialized() else _start(ray, workers):
            task = ray.remote(num_cpus=1, max_retries=1)(run_job)
            running: dict[Future[JobResult], object] = {}  # references, to cancel the tasks

            def submit[J](function: Callable[[J], object], job: J) -> Future[JobResult]:
                reference = task.remote(function, job)
                future = reference.future()
                running[future] = reference
                future.add_done_callback(lambda done: running.pop(done, None))
                return future

            try:
                yield Engine(submit=submit, workers=workers or max(1, int(ray.cluster_resources().get("CPU", 1))))
            finally:
                for reference in list(running.values()):
                    ray.cancel(reference, force=True)


@contextmanager
def _start(ray: ModuleType, workers: int | None) -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        options = {}
        if not os.environ.get("RAY_ADDRESS"):
            options = {"num_cpus": workers, "include_dashboard": False, "_temp_dir": folder}
            options["object_store_memory"] = _OBJECT_STORE_BYTES
        ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Sets environment variables inside the context."""
    before = {name: os.environ[name] for name in variables if name in os.environ}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]
        os.environ.update(before)
