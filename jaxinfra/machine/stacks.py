"""Writes what every thread of this process does, for people who look for the cause of a hang."""

import os
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType

from jaxinfra.storage.credentials import mask_credentials
from jaxinfra.storage.location import is_remote

STACKS_FOLDER = "stacks"
_LIBRARY = f"{os.path.dirname(threading.__file__)}{os.sep}"


def all_stacks() -> str:
    """Returns the stacks of all threads of Python, the main thread first."""
    frames, threads = sys._current_frames(), {each.ident: each for each in threading.enumerate()}
    main = threading.main_thread().ident
    parts = []
    for ident in sorted(frames, key=lambda each: each != main):
        name = threads[ident].name if ident in threads else "a thread that Python has not started"
        parts.append(f"{name} ({ident})\n{''.join(traceback.format_stack(frames[ident]))}")
    return "\n".join(parts)


def threads_that_hang(*, with_main: bool = True) -> list[str]:
    """Returns where the main thread is, and each that it joins or that Python waits for at its end."""
    frames, main = sys._current_frames(), threading.main_thread()
    joined, frame = None, frames.get(main.ident or 0)
    while frame is not None and joined is None:
        joined = frame.f_locals.get("self") if frame.f_code is threading.Thread.join.__code__ else None
        frame = frame.f_back
    threads = [main] if with_main else []
    threads += [each for each in threading.enumerate() if each is not main and (each is joined or not each.daemon)]
    return [f"{each.name} in {_place(frames[each.ident or 0])}" for each in threads if each.ident in frames]


def _place(innermost: FrameType) -> str:
    """Returns the innermost function outside of Python's own library."""
    frame: FrameType | None = innermost
    while frame is not None and (file := frame.f_code.co_filename).startswith(_LIBRARY) and "-packages" not in file:
        frame = frame.f_back
    frame = frame or innermost
    return f"{frame.f_code.co_name} ({'/'.join(Path(frame.f_code.co_filename).parts[-2:])}:{frame.f_lineno})"


class StackFiles:
    """Writes stacks into the directory of a run, as `stacks/TIME-rank-N.txt`, in a folder or a bucket."""

    def __init__(self, location: str, index: int) -> None:
        """Takes the path or URL of the run directory, and the index of this process."""
        self.folder, self._location, self._index = f"{location}/{STACKS_FOLDER}", location, index

    def write(self, text: str) -> None:
        """Writes the stacks of this process, from `all_stacks`; StorageError or OSError if that fails."""
        name = f"{STACKS_FOLDER}/{time.strftime('%Y%m%dT%H%M%S')}-rank-{self._index}.txt"
        content = mask_credentials(text).encode()
        if is_remote(self._location):
            from jaxinfra.storage.objects import ObjectStore  # imports TensorStore, which --help does not wait for

            ObjectStore(self._location).write(name, content)
            return
        path = Path(self._location, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_bytes(content)  # not synced: the process has little time, and a disk may be what hangs
        part.replace(path)
