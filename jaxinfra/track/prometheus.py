"""Serves the state of a run to Prometheus: a page in the OpenMetrics format, which is made when it is asked for.

The names are in `docs/watch.md`, the alert rules that use them in `docs/prometheus`.
"""

import re
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, override

from jaxinfra.errors import ConfigError
from jaxinfra.packages import import_optional
from jaxinfra.track.base import RunStatistics, Tracker
from jaxinfra.track.config import Prometheus
from jaxinfra.track.formatting import grouped_name, shown_metrics
from jaxinfra.track.goodput import GOODPUT_FILE, account, read_ledger

_PREFIX = "jaxinfra_"
_NO_WORD = re.compile("[^a-zA-Z0-9_]")


class PrometheusTracker(Tracker):
    """Answers scrapes in a thread, from `start` to `close`; no step waits for one."""

    def __init__(self, config: Prometheus, run_dir: Path) -> None:
        """Opens nothing yet; raises ConfigError if the client library is missing."""
        install = "jaxinfra[prometheus]"
        self._client = import_optional(
            "prometheus_client", "core", "exposition", needed_by="track.prometheus", install=install
        )
        self._config, self._run_dir, self._lock = config, run_dir, threading.Lock()
        self._metrics: dict[str, float] = {}
        self._gauges: dict[str, float] = {}
        self._server: Any = None

    @override
    def start(self, record: Mapping[str, Any], statistics: RunStatistics, *, start_step: int, total_steps: int) -> None:
        now_s = time.time()
        self._gauges = {"step": start_step, "steps_planned": total_steps, "start_timestamp_seconds": now_s}
        self._gauges["progress_timestamp_seconds"] = now_s
        registry = self._client.CollectorRegistry()
        registry.register(self)
        config = self._config
        try:
            self._server, _ = self._client.start_http_server(config.port, config.address, registry)
        except OSError as error:
            where = f"track.prometheus.port={config.port}"
            raise ConfigError(f"{where}: {config.address}: {error.strerror}; use another port") from None

    @override
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        named = {grouped_name(name): value for name, value in shown_metrics(metrics).items()}
        with self._lock:
            self._metrics |= named

    @override
    def finish_step(self, step: int) -> None:
        self._gauges |= {"step": step, "progress_timestamp_seconds": time.time()}

    @override
    def log_save(self, step: int) -> None:
        self._gauges |= {"save_step": step, "save_timestamp_seconds": time.time()}

    def collect(self) -> Iterator[Any]:
        """Yields the metrics of a scrape; the client library calls it."""
        run, family = self._run_dir.name, self._client.core.GaugeMetricFamily

        def gauge(name: str, value: float, what: str) -> Any:
            found = family(f"{_PREFIX}{_NO_WORD.sub('_', name)}", what, labels=["run"])
            found.add_metric([run], value)
            return found

        with self._lock:
            metrics = dict(self._metrics)
        for name, value in {**self._gauges}.items():
            yield gauge(name, value, name.replace("_", " "))
        for name, value in metrics.items():
            yield gauge(name, value, f"{name} of the last logged step")
        spent = account(read_ledger(self._run_dir / GOODPUT_FILE))
        yield gauge("goodput", spent.fraction, "time of steps that were not lost, as a fraction of the whole")
        yield gauge("attempts", spent.attempts, "starts of the run so far")
        seconds = family(
            f"{_PREFIX}spent_seconds", "time of all starts so far, by what it went into", labels=["run", "on"]
        )
        for name, value in spent.seconds.items():
            seconds.add_metric([run, name], value)
        yield seconds

    @override
    def close(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()

    @override
    def abandon(self) -> None:
        self.close()
