"""Trains in a worker of Ray Train: the function that JaxTrainer calls, and what it and the driver tell each other."""

import asyncio
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxinfra.errors import ConfigError, JaxinfraError, Preempted
from jaxinfra.launchers.places.job import ATTEMPT_FILE
from jaxinfra.launchers.places.ray_package import RANK_LINE, take_secrets
from jaxinfra.launchers.restart_policy import RULES, Rule
from jaxinfra.processes import ray_train
from jaxinfra.processes.door import SECRET, new_secret
from jaxinfra.processes.peers import current_peers
from jaxinfra.storage import credentials
from jaxinfra.user_code import ending_of

TOP = Path(__file__).parents[2]
"""Where Ray has unpacked the code."""


class Control:
    """An actor beside the driver: the workers tell it how they are, and it tells them to stop."""

    def __init__(self) -> None:
        self._stop = asyncio.Event()
        self._secret, self._starts, self._codes = new_secret(), 0, dict[int, int]()

    async def begin(self, rank: int) -> tuple[str, bool]:
        """Notes that a worker begins; returns the secret of the run's processes, and whether they are to stop."""
        self._codes.pop(rank, None)
        self._starts += rank == 0
        return self._secret, self._stop.is_set()

    async def end(self, rank: int, code: int) -> bool:
        """Notes the exit code of a worker; returns whether the workers were asked to stop."""
        self._codes[rank] = code
        return self._stop.is_set()

    async def state(self) -> tuple[int, Mapping[int, int]]:
        """Returns how often the workers have begun together, and the exit codes of those that have ended, by rank."""
        return self._starts, self._codes

    async def stop(self) -> None:
        """Lets the workers save and leave."""
        self._stop.set()

    async def stopping(self) -> None:
        """Returns once the workers are to stop."""
        await self._stop.wait()


def rule_of(code: int) -> Rule:
    """Returns what follows from an exit code."""
    return RULES.get(code, RULES[JaxinfraError.exit_code])


def train(control: Any, run_dir: str, attempt: int, folder: str, words: Sequence[str]) -> None:
    """Runs the command of the run as one process of it; an exception lets Ray Train start all workers again.

    A worker whose code needs a person waits for its end: the driver ends the job once it knows the code.
    """
    import ray

    rank = ray_train.context().get_world_rank()
    print(RANK_LINE.format(rank=rank), flush=True)
    os.environ[SECRET], is_stopped = ray.get(control.begin.remote(rank))
    take_secrets(TOP)
    os.chdir(TOP / folder)
    sys.path.insert(0, os.getcwd())
    if is_stopped:
        code = Preempted.exit_code
    else:
        has_ended = threading.Event()
        threading.Thread(target=_hear, args=(control, has_ended), name="stop", daemon=True).start()
        code = _run(run_dir, attempt, words)
        has_ended.set()
    is_stopped = ray.get(control.end.remote(rank, code))
    if code == 0:
        return
    rule = rule_of(code)
    if is_stopped or not rule.restarts:
        threading.Event().wait()
    time.sleep(rule.wait_s)
    logging.getLogger("ray.train").setLevel(logging.CRITICAL)  # what went wrong stands there already
    raise RuntimeError(f"exit code {code} ({rule.meaning})")


def _hear(control: Any, has_ended: threading.Event) -> None:
    """The thread that hears of a stop, as others of signals: Ray calls the function in none that gets them."""
    import ray

    ray.get(control.stopping.remote())
    if not has_ended.is_set():
        current_peers().request("stop", "stop of the job")


def _run(run_dir: str, attempt: int, words: Sequence[str]) -> int:
    """Returns the exit code of the run."""
    credentials.mask_stderr()
    logging.getLogger().setLevel(logging.WARNING)  # Ray shows all from INFO on, of all packages
    from jaxinfra.cli.main import run_command

    try:
        check_shared(run_dir, attempt)
        return run_command(words)
    except (Exception, SystemExit) as error:
        ending = ending_of(error)
        if ending.code == JaxinfraError.exit_code:  # a bug
            traceback.print_exc()
        print(f"error: {ending.line}", file=sys.stderr, flush=True)
        return ending.code


def check_shared(run_dir: str, attempt: int) -> None:
    """Raises ConfigError if this node does not see the run directory of the machine that has started the attempt."""
    from jaxinfra.storage.objects import ObjectStore

    if ObjectStore(run_dir).read_or_none(ATTEMPT_FILE.format(attempt=attempt)) is None:
        fix = "name a bucket, or a folder that the launching machine and all nodes share: root=gs://BUCKET/runs"
        raise ConfigError(f"{run_dir}: node {socket.gethostname()} of the Ray cluster does not have it; {fix}")
