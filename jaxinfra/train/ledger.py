"""Writes goodput.jsonl, the ledger of how a run spends its time; `track.goodput` reads it, and defines its rows."""

import json
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from jaxinfra.errors import StorageError
from jaxinfra.storage.appender import Appender
from jaxinfra.storage.errors import storage_errors
from jaxinfra.storage.json_lines import truncate_json_lines
from jaxinfra.track.goodput import ledger_row
from jaxinfra.train import compiles
from jaxinfra.train.phases import Phases

_BEAT_S = 10.0
"""Longest time between two rows."""

_log = logging.getLogger(__name__)


class Ledger:
    """Appends the state of `phases` to a file; a kill loses at most what came after the last row.

    Writes nothing before `open` and after `close`. A full disk does not end the run: rows wait in memory, and the first
    failure is reported. `joules` returns the energy that all devices have used since the start, if that is measured.
    """

    def __init__(self, phases: Phases) -> None:
        self._phases, self._lock = phases, threading.Lock()
        self._attempt, self._saves, self._failed = 0, 0, False
        self._written_s = math.inf  # the watchdog calls `beat`, which writes no row before the first one
        self._file: Appender | None = None
        self.joules: Callable[[], float | None] = lambda: None

    def open(self, path: Path, processes: int, **more: object) -> None:
        """Opens the file and writes the first row, with the fields `more`; raises StorageError if that fails."""
        with storage_errors(path):
            rows = truncate_json_lines(path, ledger_row, lambda row: True)
            self._attempt = max((row["attempt"] for row in rows), default=0) + 1
            self._file = Appender(path)
        start_s = time.time() - (time.monotonic() - self._phases.start_s)
        self.write(start=start_s, host=socket.gethostname(), pid=os.getpid(), processes=processes, **more)
        self._phases.on_leave = self._left

    def write(self, **more: object) -> None:
        """Appends a row with the fields `more`; any thread may call it."""
        with self._lock:
            if self._file is None:
                return
            phases = self._phases
            rounded = {name: round(value, 4) for name, value in phases.seconds().items()}
            seconds = {name: value for name, value in rounded.items() if value}
            self._written_s = time.monotonic()
            row = {
                "attempt": self._attempt,
                "t": round(sum(seconds.values()), 4),
                "phase": phases.current,
                "step": phases.done,
                "saves": self._saves,
                "from": phases.start_step,
                "resumes": phases.resumes,
                "compiles": compiles.count(),
                "seconds": seconds,
            }
            if (joules := self.joules()) is not None:
                row["joules"] = round(joules, 1)
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
        """Appends a row, since a phase has ended."""
        if phase == "save":
            self._saves += 1
        self.write()

    def close(self) -> None:
        """Appends the last row, and reports a full disk if it has cost rows."""
        self._phases.on_leave = lambda phase: None
        self.write()
        with self._lock:  # the thread of the watchdog may still call `write`
            file, self._file = self._file, None
        try:
            if file is not None:
                file.close()
        except StorageError as error:
            _log.error("%s", error)
