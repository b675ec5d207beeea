"""Scenes that need a process of their own: `python -m tests.checkpoint.child <scene> <directory>`."""

import json
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from jaxinfra.checkpoint.bucket_saver import BucketSaver
from jaxinfra.checkpoint.bucket_steps import BucketSteps
from jaxinfra.checkpoint.config import CheckpointConfig
from jaxinfra.checkpoint.leaves import tree_bytes
from jaxinfra.checkpoint.manager import CheckpointManager
from jaxinfra.errors import StorageError
from tests.faults.formats import golden_state

from .states import make_mesh, make_state

LEAVES = 16  # most of them fail after the first one


def random_state(seed: int, rows: int, leaves: int = 1) -> dict[str, Any]:
    """A state of several equal leaves."""
    key = jax.random.key(seed)
    names = ["w", *(f"w{i}" for i in range(1, leaves))]
    return {"params": {name: jax.random.normal(key, (rows, 1024)) for name in names}}


@contextmanager
def small_files() -> Iterator[None]:
    """Limits files to 1 MB within this context, which fails as a full disk does."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def no_space(directory: Path) -> dict[str, Any]:
    """Two saves fail in the background; the third has space again."""
    failures = []
    with CheckpointManager(directory, CheckpointConfig(save_every=10)) as checkpoints:
        for step in (10, 20):
            checkpoints.save(step, random_state(step, 1024, LEAVES), {})
        checkpoints.wait_until_finished()
        with small_files():
            for step in (30, 40):
                checkpoints.save(step, random_state(step, 1024, LEAVES), {})
                deadline = time.monotonic() + 30
                try:
                    while time.monotonic() < deadline:
                        checkpoints.save(step + 1, {}, {})  # not due, but raises the error of the failed save
                except StorageError as error:
                    failures.append(str(error))
        left = sorted(path.name for path in directory.iterdir())
        intact = checkpoints.all_steps()
        checkpoints.save(50, random_state(50, 1024, LEAVES), {})
        checkpoints.wait_until_finished()
        return {"failures": failures, "left": left, "intact": intact, "after": checkpoints.all_steps()}


def memory(directory: Path) -> dict[str, Any]:
    """Returns the bytes of a state, and of resident memory after each of 60 saves of it."""
    state = make_state(make_mesh(fsdp=2), width=8192)
    resident_bytes = []
    with CheckpointManager(directory, CheckpointConfig(save_every=1)) as checkpoints:
        for step in range(1, 61):
            checkpoints.save(step, state, {"step": step})
            checkpoints.wait_until_finished()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            resident_bytes.append(pages * resource.getpagesize())
    return {"state_bytes": tree_bytes(state), "resident_bytes": resident_bytes}


def ended(directory: Path) -> dict[str, Any]:
    """The run ends with another error while a save fails."""
    try:
        with small_files(), CheckpointManager(directory, CheckpointConfig(save_every=1)) as checkpoints:
            checkpoints.save(1, random_state(1, 1024), {})
            raise KeyError("the cause")
    except KeyError as error:
        return {"error": str(error), "notes": error.__notes__}


def golden(directory: Path) -> dict[str, Any]:
    """Saves it on a disk, and as in a bucket."""
    for where in ("disk", "bucket"):
        (directory / where).mkdir(parents=True)
        with CheckpointManager(directory / where, CheckpointConfig(save_every=1)) as checkpoints:
            if where == "bucket":
                saver = BucketSaver(BucketSteps(str(directory / where)), checkpoints.config, read_only=False)
                saver.save(1, golden_state(), {"step": 1}, {})
                saver.wait_until_finished()
            else:
                checkpoints.save(1, golden_state(), {"step": 1})
    return {}


SCENES: dict[str, Callable[[Path], dict[str, Any]]] = {
    scene.__name__: scene for scene in (no_space, ended, memory, golden)
}

if __name__ == "__main__":
    print(json.dumps(SCENES[sys.argv[1]](Path(sys.argv[2]))))
