"""A wish to stop, made by a signal and obeyed between steps."""

import signal
from types import FrameType
from typing import Any, Self


class StopRequest:
    """Inside this context Ctrl-C (SIGINT) and SIGTERM ask to stop instead of stopping.

    The loop looks at `reason` after every step, saves and leaves. A second Ctrl-C interrupts at once; further
    SIGTERMs change nothing. The handlers that were there before come back on leaving. Main thread only.
    """

    def __init__(self) -> None:
        self._reason: str | None = None
        self._interrupted = False
        self._before: dict[int, Any] = {}

    @property
    def reason(self) -> str | None:
        """Name of the signal that asked first, None while nobody has; KeyboardInterrupt after a second Ctrl-C.

        That was raised before, but Python drops an exception that comes up in a callback of the garbage collector.
        """
        if self._interrupted:
            raise KeyboardInterrupt
        return self._reason

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._reason is not None:
            self._interrupted = True
            raise KeyboardInterrupt
        self._reason = self._reason or signal.Signals(number).name
