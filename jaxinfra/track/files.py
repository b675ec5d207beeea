"""Replacing a small local file so that a reader sees the old bytes or the new ones, never half of them.

Not for checkpoints, which have a manifest, and not for object stores, which replace whole objects anyway.
"""

import contextlib
import os
import tempfile
from pathlib import Path


def replace_bytes(path: Path, data: bytes) -> None:
    """Writes `data` beside `path`, syncs it and renames it over `path`.

    Raises:
        OSError: no space, no permission; `path` is then unchanged and nothing is left beside it.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, 0o644)
            file.write(data)
            file.flush()
            os.fsync(handle)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
