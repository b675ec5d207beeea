"""Writes the report of a run while it goes on, and after every way to end: done, stopped, or by an error."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, override

from jaxinfra.errors import JaxinfraError, RunInUseError
from jaxinfra.track.base import RunStatistics, Tracker
from jaxinfra.track.report import EVERY_S, write_report

_FIRST_S = 5.0  # seconds to the first report of a start
_MAX_SHARE = 0.01  # of the time; making the page of a long run takes seconds

_log = logging.getLogger(__name__)


class ReportTracker(Tracker):
    """Writes report.html from the other files of the run, in a thread, so that no step waits for it.

    If `check` raises RunInUseError, since another start has taken over the run, its page is not replaced.
    """

    def __init__(self, run_dir: Path, check: Callable[[], None] = lambda: None) -> None:
        self._run_dir, self._check = run_dir, check
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    @override
    def start(self, record: Mapping[str, Any], statistics: RunStatistics, *, start_step: int, total_steps: int) -> None:
        self._thread = threading.Thread(target=self._write_regularly, name="report", daemon=True)
        self._thread.start()

    @override
    def close(self) -> None:
        if self._thread is not None:
            self.abandon()
            self._write(is_running=False)

    @override
    def abandon(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            self._ended.set()
            thread.join()

    def _write(self, *, is_running: bool, check: Callable[[], None] = lambda: None) -> None:
        try:
            if (self._run_dir / "run.json").exists():  # trackers can be used without the record of a run
                write_report(self._run_dir, is_running=is_running, check=check)
        except RunInUseError:
            raise
        except JaxinfraError as error:  # the other files have the results
            _log.warning("%s", error)

    def _write_regularly(self) -> None:
        wait_s = _FIRST_S
        while not self._ended.wait(wait_s):
            start_s = time.monotonic()
            try:
                self._write(is_running=True, check=self._check)
            except RunInUseError:  # the main thread raises it, too
                return
            wait_s = max(EVERY_S, (time.monotonic() - start_s) / _MAX_SHARE)
