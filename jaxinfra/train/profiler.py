"""Profiles a few steps of a run: a trace for xprof, and a short text with the operations that take longest.

Outside of a profile it costs a comparison per step, and never waits for the devices.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import jax

from jaxinfra.machine.config import ProfileConfig
from jaxinfra.machine.operations import OperationTime, operation_times
from jaxinfra.storage.atomic import write_bytes_atomic

_log = logging.getLogger(__name__)

TOP_OPERATIONS = 10
"""Number of operations in the text of a profile."""
TEXT_FILE = "operations.txt"
"""The file beside the trace that has the text."""


class Profiler:
    """Begins a profile at `ProfileConfig.at`, and at the step after a `request`; a context manager, which ends one.

    A profile that fails is logged, and training goes on.
    """

    def __init__(self, config: ProfileConfig, folder: Path, *, is_active: bool = True):
        """Without `is_active` it profiles nothing."""
        self._config, self._folder, self._is_active = config, folder, is_active
        self._requested = self._has_compiled = False
        self._begin: tuple[int, float] | None = None  # completed steps and time when the profile began

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._begin is not None:  # after an error
            self._begin = None
            with self._failure_is_logged():
                jax.profiler.stop_trace()

    def request(self) -> None:
        """Asks for a profile from the next step on."""
        self._requested = True

    def begin_step(self, completed_steps: int, state: Any) -> None:
        """Begins a profile before this step if one is due; waits for `state` then, and at no other time."""
        if completed_steps == self._config.at:
            self._requested = True
        # The first step of a start compiles, which a profile must not show.
        if self._requested and self._is_active and self._has_compiled and self._begin is None:
            self._requested = False
            jax.block_until_ready(state)  # so that the trace has no operations of earlier steps
            with self._failure_is_logged():
                jax.profiler.start_trace(str(self._folder / str(completed_steps)))
                self._begin = completed_steps, time.perf_counter()
        self._has_compiled = True

    @property
    def is_running(self) -> bool:
        """Whether a profile has begun and not ended."""
        return self._begin is not None

    def ends_after(self, completed_steps: int) -> bool:
        """Whether `finish` is due after this number of steps."""
        return self._begin is not None and completed_steps - self._begin[0] >= self._config.steps

    def finish(self, completed_steps: int, state: Any) -> str | None:
        """Ends the profile and returns its text; None if there is no profile, or it failed."""
        if self._begin is None:
            return None
        jax.block_until_ready(state)
        (first, begin_s), end_s = self._begin, time.perf_counter()
        self._begin, self._requested = None, False
        path, num_steps = self._folder / str(first), completed_steps - first
        with self._failure_is_logged():
            jax.profiler.stop_trace()
            xplane = max(path.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
            step_ms = 1e3 * (end_s - begin_s) / num_steps
            text = f"profile of steps {first + 1} to {completed_steps}: {step_ms:.1f} ms a step\n"
            text += operations_table(operation_times(xplane), num_steps, jax.local_device_count())
            text += f"\ntrace: {path}; to see it: pip install xprof, then xprof --logdir {self._folder}\n"
            write_bytes_atomic(path / TEXT_FILE, text.encode())
            return text

    @contextmanager
    def _failure_is_logged(self) -> Iterator[None]:
        """Logs any error, also a bug of ours: nobody wants to lose a run to a look at it."""
        try:
            yield
        except Exception as error:
            _log.error(
                "%s: profile failed: %s; training goes on", self._folder, error, exc_info=not isinstance(error, OSError)
            )


def operations_table(times: Sequence[OperationTime], num_steps: int, num_devices: int) -> str:
    """Returns the operations that take longest as a table, with milliseconds a step on one device."""
    total_s, per_step = sum(each.seconds for each in times), num_steps * num_devices
    rows = [["ms/step", "share", "calls", "operation", "source line", "HLO instructions"]]
    for each in times[:TOP_OPERATIONS]:
        numbers = [
            f"{1e3 * each.seconds / per_step:.2f}",
            f"{each.seconds / total_s:.1%}",
            f"{each.calls / per_step:.0f}",
        ]
        first, *others = each.names
        names = f"{first} and {len(others)} more" if others else first
        rows.append([*numbers, each.kind, each.source or "(added by the compiler)", names])
    for i in range(len(rows[0])):
        width = max(len(row[i]) for row in rows)
        for row in rows:
            row[i] = row[i].rjust(width) if i < 3 else row[i].ljust(width)  # numbers to the right
    lines = ["  ".join(row).rstrip() for row in rows]
    return "\n".join([*lines, f"all operations: {1e3 * total_s / per_step:.2f} ms/step"])
