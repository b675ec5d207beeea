"""Sends metrics to a server in a thread: no step waits for it, and training does not fail because of it.

Rows wait in a queue of bounded length. While the server does not answer, the thread tries again; when the queue is
full, the oldest rows are dropped. The end of the run waits a few seconds for what is left, then reports the number of
rows that were lost. `metrics.jsonl` has them all.
"""

import json
import logging
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, override

from jaxinfra.storage.atomic import write_bytes_atomic
from jaxinfra.storage.errors import cause_of, storage_errors
from jaxinfra.track.base import RunStatistics, Tracker
from jaxinfra.track.formatting import grouped_name, shown_metrics
from jaxinfra.track.jsonl import read_json_object

_MAX_ROWS = 10_000  # about 10 MB of host memory
_BATCH_ROWS = 50
_SEND_EVERY_S = 1.0  # rows are sent together: a request costs Python time that the training loop needs, too
_FIRST_RETRY_S, _MAX_RETRY_S = 5.0, 120.0
CLOSE_S = 15.0

_log = logging.getLogger(__name__)


class Row(NamedTuple):
    """Metrics and texts of one step.

    Attributes:
        step: number of completed steps.
        time_ms: Unix time in milliseconds.
        metrics: values by group and name.
        texts: "sample" or "profile", and the text.
    """

    step: int
    time_ms: int
    metrics: Mapping[str, float] = {}
    texts: Mapping[str, str] = {}


class RemoteRun(ABC):
    """A run on a server. Its methods may be slow and may raise anything: they are called in a thread."""

    @abstractmethod
    def start(self, record: Mapping[str, Any], statistics: RunStatistics) -> str:
        """Creates the run on the server, or continues it; returns where to look at it."""

    @abstractmethod
    def send(self, rows: Sequence[Row]) -> None:
        """Sends the metrics and texts of some steps."""

    @abstractmethod
    def finish(self, status: str, summary: Mapping[str, Any]) -> None:
        """Ends the run with the status "finished", "stopped" or "failed"."""


class RemoteTracker(Tracker):
    """Passes the metrics of a run to a `RemoteRun` in a thread.

    Args:
        path: of its config, for messages.
        setting: what tells where the run is sent, such as uri=http://host.
        announce: whether to print where to look at the run.
    """

    def __init__(self, remote: RemoteRun, path: str, setting: str, *, announce: bool = True) -> None:
        self._remote, self._path, self._setting, self._announce = remote, path, setting, announce
        self._rows: deque[Row] = deque(maxlen=_MAX_ROWS)
        self._logged = self._sent = 0  # rows
        self._end: tuple[str, Mapping[str, Any]] | None = "failed", {}  # None: the remote run goes on without this one
        self._has_rows, self._closing = threading.Event(), threading.Event()
        self._reported = False
        self._thread: threading.Thread | None = None

    @override
    def start(self, record: Mapping[str, Any], statistics: RunStatistics, *, start_step: int, total_steps: int) -> None:
        self._thread = threading.Thread(target=self._run, args=(record, statistics), name=self._path, daemon=True)
        self._thread.start()

    @override
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._add(step, metrics={grouped_name(name): value for name, value in shown_metrics(metrics).items()})

    @override
    def log_sample(self, step: int, text: str) -> None:
        self._add(step, texts={"sample": text})

    @override
    def log_profile(self, step: int, text: str) -> None:
        self._add(step, texts={"profile": text})

    def _add(self, step: int, **content: Mapping[str, Any]) -> None:
        self._rows.append(Row(step, round(1000 * time.time()), **content))
        self._logged += 1
        self._has_rows.set()

    @override
    def log_summary(self, values: Mapping[str, Any]) -> None:
        self._end = values.get("status", "finished"), values

    @override
    def close(self) -> None:
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._closing.set()
        self._has_rows.set()
        thread.join(CLOSE_S)
        waited = f" within {CLOSE_S:.0f} s after the last step" if thread.is_alive() else ""
        if lost := self._logged - self._sent:
            _log.error(
                "%s: %d of %d logged rows were not sent%s; the run directory has them all",
                *(self._path, lost, self._logged, waited),
            )
        elif waited:
            _log.error("%s: the end of the run was not confirmed%s", self._path, waited)

    @override
    def abandon(self) -> None:
        self._end = None
        self._rows.clear()
        self._closing.set()
        self._has_rows.set()

    def _run(self, record: Mapping[str, Any], statistics: RunStatistics) -> None:
        """The thread: starts the remote run, sends rows until the end, and finishes it."""

        def start() -> None:
            address = self._remote.start(record, statistics)
            if self._announce:
                print(f"{self._path}: {address}", file=sys.stderr)

        if not self._retry(start):
            return
        ends = False
        while not ends:
            self._has_rows.wait()
            self._has_rows.clear()
            ends = self._closing.is_set()  # no row follows after `close`
            while self._rows:
                batch = [self._rows.popleft() for _ in range(min(len(self._rows), _BATCH_ROWS))]
                if not self._retry(lambda batch=batch: self._remote.send(batch)):
                    return
                self._sent += len(batch)
            self._closing.wait(_SEND_EVERY_S)
        if (end := self._end) is not None:
            self._retry(lambda: self._remote.finish(*end))

    def _retry(self, call: Callable[[], None]) -> bool:
        """Calls until that succeeds; reports the first error. Returns False if it fails after the end of the run."""
        wait_s = _FIRST_RETRY_S
        while True:
            is_last = self._closing.is_set()
            try:
                call()
            except Exception as error:
                if not self._reported:
                    self._reported = True
                    _log.error(
                        "%s.%s: %s; training goes on, and metrics are sent when that works",
                        *(self._path, self._setting, cause_of(_system_error(error) or error)),
                    )
            else:
                return True
            if is_last:
                return False
            self._closing.wait(wait_s)
            wait_s = min(2 * wait_s, _MAX_RETRY_S)


def _system_error(error: BaseException | None) -> OSError | None:
    """Returns the operating system's error that a client's exception wraps, such as "Connection refused"."""
    while error is not None and not (isinstance(error, OSError) and error.strerror):
        error = error.__cause__ or error.__context__
    return error


def remote_id(path: Path, target: str, create: Callable[[], str]) -> str:
    """Returns the id of the run at `target`: the one kept in `path`, so that a resume continues that run, or a new one.

    Raises StorageError if the file is damaged or cannot be written.
    """
    kept = read_json_object(path) if path.exists() else {}
    if kept.get("target") == target:
        return kept["id"]
    run_id = create()
    with storage_errors(path):
        write_bytes_atomic(path, json.dumps({"target": target, "id": run_id}, indent=2).encode() + b"\n")
    return run_id
