"""Makes memory cgroups and small disks, and finds the library of a wrong clock; a machine may lack each of them."""

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_V1, _V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
_ENTER = ("sh", "-c", 'echo $$ > "$0" && exec "$@"')  # the group's file, then the command


@contextmanager
def memory_limit(num_bytes: int) -> Iterator[Sequence[str]]:
    """Makes a memory cgroup, and yields the words that run a command in it; () where none can be made."""
    is_v1 = (_V1 / "memory.limit_in_bytes").exists()
    group = (_V1 if is_v1 else _V2) / f"jaxinfra-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if is_v1 else "memory.max")).write_text(str(num_bytes))
    except OSError:  # not allowed, or no memory controller
        if group.exists():
            group.rmdir()
        yield ()
        return
    try:
        yield (*_ENTER, str(group / "cgroup.procs"))
    finally:
        _remove(group)


def _remove(group: Path) -> None:
    """Removes a cgroup once its last process is gone."""
    deadline_s = time.monotonic() + 10
    while True:
        try:
            return group.rmdir()
        except OSError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.1)


@contextmanager
def small_disk(num_bytes: int, *, read_only: bool = False, inodes: int | None = None) -> Iterator[Path | None]:
    """Mounts a disk of this size, or with so many files, in memory; None where that is not allowed."""
    with tempfile.TemporaryDirectory(prefix="jaxinfra-disk-") as name:
        options = [f"size={num_bytes}", *["ro"] * read_only, *([] if inodes is None else [f"nr_inodes={inodes}"])]
        mount = ["mount", "-t", "tmpfs", "-o", ",".join(options), "jaxinfra", name]
        if os.getuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
            yield None
            return
        try:
            yield Path(name)
        finally:
            subprocess.run(["umount", "-l", name], check=True)


def faketime_library() -> Path | None:
    """Returns the library that gives a process another clock; None if it is not installed."""
    folders = (*Path("/usr/lib").glob("*/faketime"), Path("/usr/lib64/faketime"), Path("/usr/lib/faketime"))
    return next((path for folder in folders if (path := folder / "libfaketime.so.1").exists()), None)
