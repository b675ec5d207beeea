"""attempts.jsonl: the starts of a run under a supervisor and how each has ended, for other programs to read.

Each line is a JSON object with the fields of `launchers.supervisor.Attempt`, such as

    {"attempt": 2, "host": "node1", "supervisor": 4711, "pids": [4811, 4812],
     "started": "2026-11-27T08:00:02.120+00:00", "ended": "2026-11-27T09:30:00.000+00:00",
     "started_monotonic_s": 86402.120, "ended_monotonic_s": 91800.000, "exit_code": 76, "signal": "SIGKILL", "rank": 1,
     "reason": "process 1 killed by SIGKILL", "error": null, "log": "runs/x/logs/rank-1.log",
     "first_step": 201, "last_step": 240}

The supervisor of process 0 appends it after the processes have ended, whatever has ended them.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxinfra.errors import StorageError
from jaxinfra.storage.appender import Appender
from jaxinfra.storage.errors import storage_errors
from jaxinfra.storage.location import is_remote
from jaxinfra.storage.objects import ObjectStore

ATTEMPTS_FILE = "attempts.jsonl"

_log = logging.getLogger(__name__)


class AttemptLog:
    """Appends to the attempts of a run; a line that cannot be written is tried again with the next one."""

    def __init__(self, location: str) -> None:
        """Takes the directory or URL of the run."""
        self._location, self._pending = location, b""

    def append(self, attempt: Mapping[str, Any]) -> None:
        """Appends an attempt; a storage failure is only reported, since the run goes on."""
        self._pending += json.dumps(attempt).encode() + b"\n"
        try:
            self._write(self._pending)
            self._pending = b""
        except StorageError as error:
            _log.warning("%s; the attempt is recorded after the next one", error)

    def _write(self, lines: bytes) -> None:
        if not is_remote(self._location):
            path = Path(self._location, ATTEMPTS_FILE)
            with storage_errors(path):
                file = Appender(path)
                try:
                    file.append(lines)
                finally:
                    file.abandon()
            return

        def append(content: bytes | None) -> bytes:
            old = content or b""
            return old if old.endswith(lines) else old + lines  # the answer to a first try may be lost

        ObjectStore(self._location).atomic_update(ATTEMPTS_FILE, append)
