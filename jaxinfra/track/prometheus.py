"""Serves the state of a run to Prometheus: a page in the OpenMetrics format, which is made when it is asked for.

The names are in `docs/watch.md`, the alert rules and the dashboard that use them in `docs/prometheus`.
"""

import errno
import math
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, override

from jaxinfra.errors import ConfigError, NonFiniteError
from jaxinfra.packages import import_optional
from jaxinfra.track.base import RunStatistics, Tracker
from jaxinfra.track.config import Prometheus
from jaxinfra.track.formatting import grouped_name, shown_metrics
from jaxinfra.track.goodput import GOODPUT_FILE, account, read_ledger

_PREFIX = "jaxinfra_"
_LAST_SCRAPE_S = 15.0  # for which the end of a run waits for the scrape that sees it
_SENT_S = 0.5  # from making a page to its end at the other side
_SCRAPED_S = 120.0  # a run that was last scraped longer ago does not wait
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
        self._skipped_steps = 0.0
        self._saves_s: list[float] = []  # when this start began, and when it knew of complete saves
        self._error: str | None = None  # that ended the run
        self._has_last_page = False
        self._scraped_s, self._scraped_last = -math.inf, threading.Event()
        self._server: Any = None

    @override
    def start(self, record: Mapping[str, Any], statistics: RunStatistics, *, start_step: int, total_steps: int) -> None:
        now_s = time.time()
        self._gauges = {"step": start_step, "steps_planned": total_steps, "start_timestamp_seconds": now_s}
        self._gauges["progress_timestamp_seconds"], self._saves_s = now_s, [now_s]
        registry = self._client.CollectorRegistry()
        registry.register(self)
        config = self._config
        try:
            self._server, _ = self._client.start_http_server(config.port, config.address, registry)
        except OSError as error:
            is_elsewhere = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
            if is_elsewhere:
                where, fix = f"track.prometheus.address={config.address}", "an address of this machine"
            else:
                where, fix = f"track.prometheus.port={config.port}: {config.address}", "another port"
            raise ConfigError(f"{where}: {error.strerror}; use {fix}") from None

    @override
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        named = {grouped_name(name): value for name, value in shown_metrics(metrics).items()}
        with self._lock:
            self._metrics |= named
            self._skipped_steps += metrics.get("skipped_steps", 0.0)

    @override
    def finish_step(self, step: int) -> None:
        self._gauges |= {"step": step, "progress_timestamp_seconds": time.time()}

    @override
    def log_saved(self, step: int) -> None:
        self._saves_s.append(time.time())
        usual_s = median(after - before for before, after in pairwise(self._saves_s))
        self._gauges |= {"save_step": step, "save_timestamp_seconds": self._saves_s[-1]}
        self._gauges["save_interval_seconds"] = usual_s

    @override
    def log_summary(self, values: Mapping[str, Any]) -> None:
        if values.get("status") == "finished":
            self._gauges["end_timestamp_seconds"] = time.time()
            self._has_last_page = True

    @override
    def log_error(self, error: BaseException) -> None:
        # The process ends: nothing else says that it was the loss. It is no error that the run goes back (`Rewind`).
        if type(error) is NonFiniteError:
            self._error, self._has_last_page = type(error).__name__, True

    def collect(self) -> Iterator[Any]:
        """Yields the metrics of a scrape; the client library calls it."""
        run, is_last, core = self._run_dir.name, self._has_last_page, self._client.core

        def family(kind: Any, name: str, what: str, values: Mapping[str, float], label: str | None = None) -> Any:
            labels = ["run"] if label is None else ["run", label]
            found = kind(f"{_PREFIX}{_NO_WORD.sub('_', name)}", what, labels=labels)
            for key, value in values.items():
                found.add_metric([run, key][: len(labels)], value)
            return found

        def gauge(name: str, value: float, what: str) -> Any:
            return family(core.GaugeMetricFamily, name, what, {"": value})

        with self._lock:
            metrics, skipped_steps = dict(self._metrics), self._skipped_steps
        for name, value in {**self._gauges}.items():
            yield gauge(name, value, name.replace("_", " "))
        for name, value in metrics.items():
            yield gauge(name, value, f"{name} of the last logged step")
        if self._error is not None:
            yield family(core.GaugeMetricFamily, "failed", "1: an error ends the run", {self._error: 1.0}, "error")
        what = "steps of this start without an update, since their loss or gradient was not finite"
        yield family(core.CounterMetricFamily, "skipped_steps", what, {"": skipped_steps})
        spent = account(read_ledger(self._run_dir / GOODPUT_FILE))
        yield gauge("goodput", spent.fraction, "time of steps that were not lost, as a fraction of the whole")
        yield gauge("attempts", spent.attempts, "starts of the run so far")
        what = "time of all starts so far, by what it went into"
        yield family(core.GaugeMetricFamily, "spent_seconds", what, {"step": 0.0, **spent.seconds}, "on")
        if spent.joules is not None:
            what = "that the devices of all starts have used"
            yield family(core.CounterMetricFamily, "energy_joules", what, {"": spent.joules})
        if spent.planned_joules is not None:
            yield gauge("planned_energy_joules", spent.planned_joules, "of the steps of all starts, by the plan")
        self._scraped_s = time.monotonic()
        if is_last:
            self._scraped_last.set()

    @override
    def close(self) -> None:
        is_scraped = self._server is not None and time.monotonic() - self._scraped_s < _SCRAPED_S
        if is_scraped and self._has_last_page and self._scraped_last.wait(_LAST_SCRAPE_S):
            time.sleep(_SENT_S)
        self.abandon()

    @override
    def abandon(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
