"""Prints the progress of a command that reads or writes many bytes."""

import sys
import time

from jaxinfra.track.formatting import format_bytes

_EVERY_S = 5.0


class ByteProgress:
    """Prints a line to standard error every few seconds."""

    def __init__(self, prefix: str = "") -> None:
        self._prefix, self._start_s = prefix, time.monotonic()
        self._next_s = self._start_s + _EVERY_S

    def __call__(self, done: int, total: int) -> None:
        """Takes the number of bytes that are done, and of all."""
        now_s = time.monotonic()
        if now_s < self._next_s:
            return
        self._next_s = now_s + _EVERY_S
        speed = done / (now_s - self._start_s) / 1e9
        sizes = f"{format_bytes(done)} of {format_bytes(total)}"
        print(f"{self._prefix}{sizes}, {speed:.2f} GB/s", file=sys.stderr, flush=True)
