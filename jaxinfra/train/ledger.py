"""Writes goodput.jsonl, the ledger of the time of a run; `track.goodput` reads it, and has its format."""

import json
import logging
import os
import socket
import threading
import time
from pathlib import Path

from jaxinfra.errors import StorageError
from jaxinfra.storage.appender import Appender
from jaxinfra.storage.errors import storage_errors
from jaxinfra.storage.json_lines import truncate_json_lines
from jaxinfra.track.goodput import ledger_row
from jaxinfra.train.phases import Phases

_BEAT_S = 10.0
"""Longest time between two rows."""

_log = logging.getLogger(__name__)


class Ledger:
    """Appends the state of `phases` to a file; a kill loses at most what came after the last row.

    A full disk does not end the run: rows wait in memory, and the first failure is reported.
    """

    def __init__(self, path: Path, phases: Phases) -> None:
        """Opens the file and writes the first row; raises StorageError if that fails."""
        self._phases, self._lock = phases, threading.Lock()
        self._saves, self._written_s, self._failed, self._closed = 0, 0.0, False, False
        with storage_errors(path):
            rows = truncate_json_lines(path, ledger_row, lambda row: True)
            self._attempt = max((row["attempt"] for row in rows), default=0) + 1
            self._file = Appender(path)
        start_s = time.time() - (time.monotonic() - phases.start_s)
        self.write(start=start_s, host=socket.gethostname(), pid=os.getpid())
        phases.on_leave = self._left

    def write(self, **more: object) -> None:
        """Appends a row, from any thread."""
        with self._lock:
            if self._closed:
                return
            phases = self._phases
            rounded = {name: round(value, 4) for name, value in phases.seconds().items()}
            seconds = {name: value for name, value in rounded.items() if value}
            self._written_s = time.monotonic()
            row = {
                "attempt": self._attempt,
                "t": round(sum(seconds.values()), 4),
                "phase": phases.progress().phase,
                "step": phases.done,
                "saves": self._saves,
                "from": phases.start_step,
                "resumes": phases.resumes,
                "seconds": seconds,
            }
            try:
                self._file.append(json.dumps(row | more).encode() + b"\n")
            except OSError as error:
                if not self._failed:
                    _log.error("the goodput ledger cannot be written: %s; training goes on", error)
                self._failed = True

    def beat(self) -> None:
        """Appends a row if the last one is old."""
        if time.monotonic() - self._written_s >= _BEAT_S:
            self.write()

    def _left(self, phase: str) -> None:
        self._saves += phase == "save"
        self.write()

    def close(self) -> None:
        """Appends the last row; a full disk that has cost rows is reported."""
        self._phases.on_leave = lambda phase: None
        self.write()
        with self._lock:
            self._closed = True  # the watchdog may still look
        try:
            self._file.close()
        except StorageError as error:
            _log.error("%s", error)
