"""Brings the output of several processes to one terminal, and to one log file for each of them.

What rank 0 writes to standard output is shown as it is: if this process has a terminal there, rank 0 gets a
pseudo-terminal, and its progress bar works. Lines of other ranks begin with the rank, `[2] ...`. A line of standard
error that another rank has already written is not shown again; errors are shown when all have ended. The logs have
every line, without the redrawings of a progress bar and without credentials. Neither a closed terminal nor a full disk
ends the run.
"""

import contextlib
import os
import pty
import re
import selectors
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from jaxinfra.errors import StorageError
from jaxinfra.storage.appender import Appender
from jaxinfra.storage.checks import make_writable
from jaxinfra.storage.credentials import mask_credentials
from jaxinfra.storage.errors import storage_errors

_STDOUT, _STDERR = 1, 2
_READ_BYTES = 2**16
_MAX_LINE_BYTES = 2**16  # a longer one is cut in parts
_ERROR = b"error: "
_NAME_OF_PROCESS = re.compile(rb"^error: process \d+ \([^)]*\): ")  # in the error that another rank was told
_REMEMBERED_LINES = 1000  # of standard error, to show equal ones of several ranks once
_DRAIN_S = 1.0  # for what ended processes have written; a detached process may hold their pipes open for ever
_ESCAPE_SEQUENCE = re.compile(rb"\x1b\[[0-?]*[ -/]*[@-~]")  # ECMA-48, section 5.4: colors and moves of the cursor
# Of JAX's collectives between CPUs. Several threads print such lines, so that one may have parts of two.
_GLOO_LINE = re.compile(rb"\[Gloo\] Rank \d+ is connected to [^\n]*\n")
_GLOO_PART = re.compile(rb"\[Gloo\] Rank|connected peer ranks is")
_ERASE_LINE, _HIDE_CURSOR, _SHOW_CURSOR = b"\r\x1b[2K", b"\x1b[?25l", b"\x1b[?25h"


class Output:
    """The standard output and error of the processes; a context that closes the logs."""

    def __init__(self, logs: Path | None, num_ranks: int, *, first_rank: int = 0) -> None:
        """Opens `logs/rank-N.log` to append to; raises StorageError if that fails. None keeps no logs.

        Ranks count from 0 here; `first_rank` is the number in the run of the one that is shown as rank 0.
        """
        self.first_rank = first_rank
        self._logs: list[Appender] = []
        if logs is not None:
            make_writable(logs)
            with storage_errors(logs):
                self._logs = [Appender(logs / f"rank-{first_rank + rank}.log") for rank in range(num_ranks)]
        self._streams: dict[int, _Stream] = {}  # by the descriptor that they are read from
        self._selector = selectors.DefaultSelector()
        self._screen = _Screen()
        self._terminal: int | None = None  # the pseudo-terminal of rank 0
        self._seen: dict[bytes, int] = {}  # lines of standard error, with the rank that wrote them first
        self._errors: dict[bytes, dict[int, bytes]] = {}  # by their message, the line of each rank

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._screen.restore()
        for descriptor in self._streams:
            os.close(descriptor)
        self._selector.close()
        for log in self._logs:
            try:
                log.close()
            except StorageError as error:
                self.say(f"warning: {error}")

    def open(self, rank: int) -> tuple[int, int]:
        """Returns descriptors for the standard output and error of a rank; the caller closes them."""
        if rank == 0 and self._screen.is_terminal:
            self._terminal, stdout = pty.openpty()
            attributes = termios.tcgetattr(stdout)
            attributes[1] &= ~termios.OPOST  # the real terminal turns \n into \r\n
            termios.tcsetattr(stdout, termios.TCSANOW, attributes)
            self.resize()
            self._add(_Stream(rank, _STDOUT, raw=True), self._terminal)
        else:
            source, stdout = os.pipe()
            self._add(_Stream(rank, _STDOUT, raw=False), source)
        source, stderr = os.pipe()
        self._add(_Stream(rank, _STDERR, raw=False), source)
        return stdout, stderr

    def resize(self) -> None:
        """Gives rank 0 the size of the terminal; to be called when that changes (SIGWINCH)."""
        if self._terminal is not None:
            with contextlib.suppress(termios.error):  # the terminal has been closed
                termios.tcsetwinsize(self._terminal, termios.tcgetwinsize(_STDOUT))

    def say(self, text: str) -> None:
        """Writes a line of the launcher itself to standard error."""
        self._screen.write_line(mask_credentials(text).encode(errors="replace"), _STDERR)

    def log(self, rank: int, text: str) -> None:
        """Writes a line of the launcher to the log of a rank."""
        self._log(rank, text.encode(errors="replace"))

    def relay(self, timeout_s: float) -> None:
        """Waits up to `timeout_s` for output, and writes what there is to the terminal and the logs."""
        if not self._streams:
            time.sleep(timeout_s)
        for key, _ in self._selector.select(timeout_s):
            self._read(key.fd)

    def _add(self, stream: "_Stream", descriptor: int) -> None:
        self._streams[descriptor] = stream
        self._selector.register(descriptor, selectors.EVENT_READ)

    def _read(self, descriptor: int) -> None:
        stream = self._streams[descriptor]
        try:
            data = os.read(descriptor, _READ_BYTES)
        except OSError:  # how Linux says that a pseudo-terminal has no writer left
            data = b""
        is_end = not data
        if stream.raw:
            self._screen.write(_GLOO_LINE.sub(b"", data))
        for line in stream.lines(None if is_end else data):
            if _GLOO_PART.search(line):
                continue
            self._log(stream.rank, line)
            if stream.target == _STDERR and line.startswith(_ERROR):
                message = _NAME_OF_PROCESS.sub(_ERROR, line)
                self._errors.setdefault(message, {})[stream.rank] = line
                stream.is_repeated = False
            elif not stream.raw and not (stream.target == _STDERR and self._is_repeated(line, stream)):
                prefix = b"[%d] " % stream.rank if stream.rank else b""
                self._screen.write_line(prefix + line, stream.target)
        if is_end:
            self._terminal = None if stream.raw else self._terminal
            self._selector.unregister(descriptor)
            del self._streams[descriptor]
            os.close(descriptor)

    def _log(self, rank: int, line: bytes) -> None:
        if not self._logs:
            return
        with contextlib.suppress(OSError):  # a full disk: the line waits, and `close` tells of those that are lost
            text = mask_credentials(_ESCAPE_SEQUENCE.sub(b"", line).decode(errors="surrogateescape"))
            self._logs[rank].append(text.encode(errors="surrogateescape") + b"\n")

    def _is_repeated(self, line: bytes, stream: "_Stream") -> bool:
        """Returns whether another rank has written this line to standard error a short while ago.

        An indented line goes with the one before: a traceback is shown whole, or only in the message that differs.
        """
        if not line.startswith((b" ", b"\t")):
            stream.is_repeated = self._seen.setdefault(line, stream.rank) != stream.rank
            if len(self._seen) > _REMEMBERED_LINES:
                del self._seen[next(iter(self._seen))]
        return stream.is_repeated

    def show_errors(self, known_rank: int | None) -> None:
        """Shows each error once, as rank 0 has written it if it has; not the loss of a rank that the launcher names."""
        for by_rank in self._errors.values():
            rank = min(by_rank)
            if known_rank is not None and by_rank[rank].startswith(b"error: process %d (" % known_rank):
                continue
            prefix = b"[%d] " % rank if rank and len(by_rank) == 1 else b""
            self._screen.write_line(prefix + by_rank[rank], _STDERR)

    def last_error(self, rank: int) -> str | None:
        """Returns the last error that a rank has written; if it has written none, the last one of any rank."""
        lines = [by_rank.get(rank) for by_rank in self._errors.values()]
        found = [line for line in lines if line] or [line for all_ in self._errors.values() for line in all_.values()]
        return found[-1].removeprefix(_ERROR).decode(errors="replace") if found else None

    def drain(self) -> None:
        """Relays what ended processes have left in their pipes."""
        deadline_s = time.monotonic() + _DRAIN_S
        while self._streams and (left_s := deadline_s - time.monotonic()) > 0:
            self.relay(left_s)


class _Stream:
    """The standard output or error of a rank, in lines; `raw` if it is a pseudo-terminal, which is shown as it is."""

    def __init__(self, rank: int, target: int, *, raw: bool) -> None:
        self.rank, self.target, self.raw = rank, target, raw
        self.is_repeated = False  # its last line that is not indented
        self._rest = b""

    def lines(self, data: bytes | None) -> Iterator[bytes]:
        """Yields the lines that `data` completes, each as it was drawn last; None ends the stream."""
        *complete, rest = (self._rest + (data or b"")).split(b"\n")
        self._rest = _last_drawn(rest)
        if self._rest and (data is None or len(self._rest) > _MAX_LINE_BYTES):
            complete.append(self._rest)
            self._rest = b""
        for line in complete:
            yield _last_drawn(line).removesuffix(b"\r")


def _last_drawn(line: bytes) -> bytes:
    """Returns what stands after the last carriage return, but for one at the end, which may belong to the newline."""
    return line[line.rfind(b"\r", 0, -1) + 1 :]


class _Screen:
    """Standard output and error of this process; if they are closed, what is written is dropped."""

    def __init__(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.is_terminal = os.isatty(_STDOUT)
        self._within_line = self._has_bar = False

    def write(self, data: bytes, target: int = _STDOUT) -> None:
        """Writes output of rank 0 as it is."""
        if data and os.isatty(target):
            self._within_line = not data.endswith(b"\n")
        if (hidden := data.rfind(_HIDE_CURSOR)) != (shown := data.rfind(_SHOW_CURSOR)):
            self._has_bar = hidden > shown
        with contextlib.suppress(OSError):  # closed: the run goes on, and the logs have all of it
            while data:
                data = data[os.write(target, data) :]

    def write_line(self, line: bytes, target: int) -> None:
        """Writes a line, above the progress bar if there is one: rank 0 draws it again."""
        if self._within_line and os.isatty(target):
            self.write(_ERASE_LINE if self._has_bar else b"\n")
        self.write(line + b"\n", target)

    def restore(self) -> None:
        """Removes the bar of a rank 0 that was killed, and shows the cursor again."""
        if self._has_bar:
            self.write(_ERASE_LINE + _SHOW_CURSOR)
