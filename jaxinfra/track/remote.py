"""Sends metrics to a server in a thread: no step waits for it, and training does not fail because of it.

Rows wait in a queue of bounded length. While the server does not answer, the thread tries again; when the queue is
full, the oldest rows are dropped. The end of the run waits a few seconds for what is left, then reports the number of
rows that were not sent. `metrics.jsonl` has them all: the next start of the run, and `sync`, send what is missing.

What is missing, the server is asked. A list of what it has confirmed, kept here, would be wrong after a kill between
its answer and the write of the list, as would one that is written before the answer.
"""

import json
import logging
import math
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, override
from uuid import uuid4

from jaxinfra.errors import JaxinfraError, StorageError
from jaxinfra.storage.atomic import write_bytes_atomic
from jaxinfra.storage.errors import cause_of, storage_errors
from jaxinfra.track.base import RunStatistics, Tracker
from jaxinfra.track.formatting import grouped_name, shown_metrics
from jaxinfra.track.goodput import GOODPUT_FILE, read_ledger
from jaxinfra.track.jsonl import METRICS_FILE, SAMPLES_FILE, read_json_object, read_metrics, read_samples

_MAX_ROWS = 10_000  # about 10 MB of host memory
_BATCH_ROWS = 50
_SEND_EVERY_S = 1.0  # rows are sent together: a request costs Python time that the training loop needs, too
_FIRST_RETRY_S, _MAX_RETRY_S = 5.0, 120.0
CLOSE_S = 15.0

_log = logging.getLogger(__name__)


class Row(NamedTuple):
    """Metrics and texts of one step."""

    step: int  # number of completed steps
    time_ms: int  # Unix time in milliseconds
    metrics: Mapping[str, float] = {}  # values by group and name
    texts: Mapping[str, str] = {}  # "sample" or "profile", and the text


type Point = tuple[str, int, float]
"""Name, step and value of a metric."""


class RemoteRun(ABC):
    """A run on a server. Its methods may be slow and may raise anything: they are called in a thread."""

    @abstractmethod
    def start(self, record: Mapping[str, Any], statistics: RunStatistics) -> str:
        """Creates the run on the server, or continues it; returns where to look at it."""

    def points(self) -> Iterable[Point]:
        """Yields the metrics that the server has; without them, what a failed request has brought there is repeated."""
        return ()

    @abstractmethod
    def send(self, rows: Sequence[Row]) -> None:
        """Sends the metrics and texts of some steps."""

    @abstractmethod
    def finish(self, status: str, summary: Mapping[str, Any], end_ms: int | None = None) -> None:
        """Ends the run, now or at a Unix time, with the status "finished", "stopped", "failed" or "interrupted"."""


class RemoteTracker(Tracker):
    """Passes the metrics of a run to a `RemoteRun` in a thread: first those of earlier starts that the server lacks.

    Args:
        path: of its config, for messages.
        setting: what tells where the run is sent, such as uri=http://host.
        announce: whether to print where to look at the run, and how many rows are sent late.
        run_dir: the folder with the rows of earlier starts; None sends none of them.
        sync_command: the command that sends later what has not arrived; "" if there is none.
    """

    def __init__(
        self,
        remote: RemoteRun,
        path: str,
        setting: str,
        *,
        announce: bool = True,
        run_dir: Path | None = None,
        sync_command: str = "",
    ) -> None:
        self._remote, self._path, self._setting, self._announce = remote, path, setting, announce
        self._run_dir = run_dir
        self._fix = f"; when the server answers: {sync_command}" if sync_command else ""
        self._rows: deque[Row] = deque(maxlen=_MAX_ROWS)
        self._earlier: deque[Row] = deque()  # rows of earlier starts that the server lacks
        self._redone: set[Point] = set()  # what it has of steps that this start makes again
        self._logged = self._sent = 0  # rows
        self._end: tuple[str, Mapping[str, Any], int | None] | None = "failed", {}, None  # None: the run goes on
        self._has_rows, self._closing = threading.Event(), threading.Event()
        self._away_s: float | None = None  # since when the server is away
        self._error: Exception | None = None  # the last one
        self._has_ended = False  # as the server has confirmed
        self._thread: threading.Thread | None = None

    @override
    def start(self, record: Mapping[str, Any], statistics: RunStatistics, *, start_step: int, total_steps: int) -> None:
        earlier = logged_rows(self._run_dir, start_step)  # now: this start appends to the files
        arguments = record, statistics, start_step, earlier
        self._thread = threading.Thread(target=self._run, args=arguments, name=self._path, daemon=True)
        self._thread.start()

    def sync(self, record: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
        """Sends what the server lacks of a run that has ended, in place of `start`; StorageError if that fails."""
        rows = logged_rows(self._run_dir)
        if not (count := len(rows)):
            self._say("nothing to send: the run directory has no metrics.jsonl")
            return
        print(f"{self._path}: asking {self._setting} what it lacks of {count} rows", flush=True)  # may take a minute
        end_ms = max(row.time_ms for row in rows)
        self._end = summary.get("status", "stopped"), summary, end_ms  # after a kill there is no summary
        self._closing.set()  # all is tried once
        self._run(record, record.get("derived", {}), sys.maxsize, rows)
        if isinstance(self._error, JaxinfraError):
            raise self._error
        if self._error is not None:
            raise StorageError(f"{self._path}.{self._setting}: cannot be written: {_cause(self._error)}{self._fix}")
        self._say(f"has all {count} rows, and how the run ended")

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
        self._end = values.get("status", "finished"), values, None

    @override
    def close(self) -> None:
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._closing.set()
        self._has_rows.set()
        thread.join(CLOSE_S)
        lost = self._logged - self._sent
        if self._has_ended and not lost:
            return
        what = f"{lost} of {self._logged} logged rows were not sent" if lost else "the end of the run was not confirmed"
        why = f" within {CLOSE_S:.0f} s after the last step" if thread.is_alive() else ""
        why = why or (f" ({_cause(self._error)})" if self._error is not None else "")
        _log.error("%s: %s%s; the run directory has all rows%s", self._path, what, why, self._fix)

    @override
    def abandon(self) -> None:
        self._end = None
        self._rows.clear()
        self._closing.set()
        self._has_rows.set()

    def _run(self, record: Mapping[str, Any], statistics: RunStatistics, start_step: int, earlier: list[Row]) -> None:
        """The thread: starts the remote run, sends rows until the end, and finishes it."""

        def start(again: bool) -> None:
            address = self._remote.start(record, statistics)
            points = [*self._remote.points()]
            # Earlier versions sent the loss of the step, with the mean that is the loss here under a name of its own.
            points += [("train/loss", step, value) for name, step, value in points if name == "train/loss_mean"]
            self._redone = {point for point in points if point[1] > start_step}
            self._earlier.extend(rows_without(earlier, points))
            earlier.clear()  # the rows of a long run take hundreds of megabytes
            self._logged += len(self._earlier)
            self._has_rows.set()
            self._say(address)

        def send(again: bool) -> None:  # a request that has failed may have reached the server
            if lacking := rows_without(batch, self._remote.points() if again else self._redone):
                self._remote.send(lacking)

        if not self._retry(start):
            return
        ends = False
        while not ends:
            self._has_rows.wait()
            self._has_rows.clear()
            ends, late = self._closing.is_set(), 0  # no row follows after `close`
            while self._end is not None and (waiting := self._earlier or self._rows):
                batch = [waiting.popleft() for _ in range(min(len(waiting), _BATCH_ROWS))]
                if not self._retry(send):
                    return
                self._sent += len(batch)
                if waiting is self._earlier or self._away_s is not None:
                    late += sum(bool(row.metrics) for row in batch)  # a text may be sent once more
            back = "" if self._away_s is None else f"back after {time.monotonic() - self._away_s:.0f} s, "
            if back or late:
                self._say(f"{back}{late} row{'s' * (late != 1)} sent late")
                self._away_s = None
            self._closing.wait(_SEND_EVERY_S)
        if (end := self._end) is not None:
            self._has_ended = self._retry(lambda again: self._remote.finish(*end))

    def _retry(self, call: Callable[[bool], None]) -> bool:
        """Calls until that succeeds, after a failure with True; returns False if it fails after the end of the run."""
        wait_s, again = _FIRST_RETRY_S, False
        while True:
            is_last = self._closing.is_set()
            try:
                call(again)
            except Exception as error:
                self._error, again = error, True
                if self._away_s is None and not is_last:
                    self._away_s = time.monotonic()
                    what = f"{self._path}.{self._setting}: {_cause(error)}"  # not logged: a log runs into the bar
                    print(f"{what}; training goes on, and metrics are sent when that works", file=sys.stderr)
            else:
                self._error = None
                return True
            if is_last:
                return False
            self._closing.wait(wait_s)
            wait_s = min(2 * wait_s, _MAX_RETRY_S)

    def _say(self, text: str) -> None:
        if self._announce:
            print(f"{self._path}: {text}", file=sys.stderr)


def _cause(error: BaseException) -> str:
    """Returns the operating system's error that a client's exception wraps, such as "Connection refused"."""
    found = [error]
    for each in found:  # which grows
        if isinstance(each, OSError) and each.strerror:
            return cause_of(each)
        inner = each.__cause__, each.__context__, *each.args
        found += [wrapped for wrapped in inner if isinstance(wrapped, BaseException) and wrapped not in found]
    return cause_of(error)


def logged_rows(run_dir: Path | None, until_step: int = sys.maxsize) -> list[Row]:
    """Returns what the files of a run have up to a step, and when it was; [] without a folder or its metrics.

    Of the texts it is the last one, which takes the place of those before it.
    """
    if run_dir is None or not (run_dir / METRICS_FILE).exists():
        return []
    times_s = {row.step: each.start_s + row.time_s for each in read_ledger(run_dir / GOODPUT_FILE) for row in each.rows}
    now_s = time.time()  # of a step without a time

    def row(step: int, **content: Mapping[str, Any]) -> Row:
        return Row(step, round(1000 * times_s.get(step, now_s)), **content)

    samples = read_samples(run_dir / SAMPLES_FILE) if (run_dir / SAMPLES_FILE).exists() else []
    rows = [row(step, texts={"sample": text}) for step, text in samples if step <= until_step][-1:]
    for values in read_metrics(run_dir / METRICS_FILE):
        shown = {name: value for name, value in shown_metrics(values).items() if name not in ("step", "time_s")}
        rows.append(row(int(values["step"]), metrics={grouped_name(name): value for name, value in shown.items()}))
    return sorted((each for each in rows if each.step <= until_step), key=lambda each: each.step)


def rows_without(rows: Sequence[Row], points: Iterable[Point]) -> list[Row]:
    """Returns what rows have besides these points; values are compared, as a step may be made again with others."""
    known = {(name, step, _comparable(value)) for name, step, value in points}
    left = []
    for row in rows:
        metrics = {n: value for n, value in row.metrics.items() if (n, row.step, _comparable(value)) not in known}
        if metrics or row.texts:  # a text takes the place of the last one, so it may be sent again
            left.append(row._replace(metrics=metrics))
    return left


def _comparable(value: float) -> float | str:
    """Returns a value that is equal to itself, and finite: MLflow keeps an infinity as the largest number."""
    return "nan" if math.isnan(value) else max(-sys.float_info.max, min(value, sys.float_info.max))


def remote_id(path: Path, target: str, create: Callable[[str], str]) -> str:
    """Returns the id of the run at `target`: the one kept in `path`, so that a resume continues that run, or a new one.

    `create` gets a key, the same one again after a kill before its id was kept: it may find the run that it has made.
    Raises StorageError if the file is damaged or cannot be written.
    """
    kept = read_json_object(path) if path.exists() else {}
    if kept.get("target") != target:
        kept = _kept(path, {"target": target, "key": uuid4().hex})
    return kept["id"] if "id" in kept else _kept(path, {**kept, "id": create(kept["key"])})["id"]


def _kept(path: Path, values: Mapping[str, str]) -> Mapping[str, str]:
    with storage_errors(path):
        write_bytes_atomic(path, json.dumps(values, indent=2).encode() + b"\n")
    return values
