"""An MLflow tracking server on loopback: SQLite in a folder, one worker."""

import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.servers.guard import free_ports, guarded, wait_until


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """A server inside the block: its address."""
    (port,) = free_ports(1)
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={port}", "--workers=1"]
    command += [f"--backend-store-uri=sqlite:///{folder}/runs.db", f"--default-artifact-root={folder}/artifacts"]
    # Jobs need a package that only the whole of MLflow brings.
    environment = ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false", "MLFLOW_DISABLE_TELEMETRY=true"]
    log = folder / "log"
    with guarded(["env", *environment, *command], log, cwd=folder):
        wait_until(
            lambda: urllib.request.urlopen(f"{address}/health", timeout=5).read(), (OSError,), log, timeout_s=600
        )
        yield address
