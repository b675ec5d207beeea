"""Refuses programs that need more memory than there is, before the first step, and explains a failed allocation.

A program needs the memory that the compiler has laid out for it, and its process some more. So it is refused only if
that part alone is more than all memory of the host or the device; one that is more than what is free now starts with a
warning.
"""

import logging
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from jaxinfra.errors import ConfigError
from jaxinfra.machine.host_memory import return_freed_memory
from jaxinfra.processes.devices import device_memory
from jaxinfra.track.formatting import format_bytes
from jaxinfra.track.memory import available_bytes, total_bytes
from jaxinfra.train.evaluation import evaluated_params
from jaxinfra.train.job import Job
from jaxinfra.user_code import is_out_of_memory

_log = logging.getLogger(__name__)
_BOOT = Path("/proc/sys/kernel/random/boot_id")  # another one for each start of a host
_CERTAIN = 0.9  # of what the compiler has laid out: a part that is never written takes no memory
_KEPT = 2.2  # times the buffers of a program: the heap that keeps what it frees, measured with the quickstart
_CAUTIOUS = 0.5  # of the free memory: what a suggested value may need
_UNKNOWN = 3.0  # times less memory: for a program that has found none


def check_step(job: Job) -> None:
    """Raises ConfigError if a step or an evaluation cannot fit, and warns if it may not.

    Each process looks at its own host or devices. The first step finds the program that this compiles.
    """
    program = job.program
    _check(job, "a train step", program.train_step.lower(program.state, program.batch))
    if job.run.train.accumulate > 1:  # without it, an evaluation needs less than a step; it is always in one part
        check_evaluation(job)
    # Here, since gloo connects the processes at their first collective operation, and waits 30 s for the others.
    job.peers.gather(None, wait_s=_wait_s(job))


def check_evaluation(job: Job) -> None:
    """Raises ConfigError if an evaluation cannot fit, and warns if it may not."""
    program, state = job.program, job.program.state
    with program.on_mesh:
        lowered = program.eval_step.lower(evaluated_params(state), program.validation_batch, state.reference)
    _check(job, "an evaluation", lowered)


@contextmanager
def out_of_memory_errors(job: Job) -> Iterator[None]:
    """Raises ConfigError with a fix for a program that has found no memory, while it is compiled or runs."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        cause, batch = " ".join(str(error).split())[:300], job.run.train.global_batch
        raise ConfigError(f"train.global_batch={batch}: {cause}; {_fix(job, _UNKNOWN)}") from error


def _wait_s(job: Job) -> float:
    """Returns how long processes wait for others that still compile: as long as in their first step."""
    return job.run.watchdog.compile_s or threading.TIMEOUT_MAX


def _check(job: Job, what: str, lowered: jax.stages.Lowered) -> None:
    stats: Any = lowered.compile().memory_analysis()
    if stats is None:  # the platform does not tell
        return
    held = stats.argument_size_in_bytes  # by the processes, already
    added = stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    peers, warns = job.peers, job.is_main
    if job.program.partitioner.platform == "cpu":  # the devices of a host share its memory
        where = peers.hosts[peers.index]
        own = [where, _BOOT.read_text() if _BOOT.exists() else ""]  # hosts may have the same name
        hosts = peers.gather(own, wait_s=_wait_s(job))
        sharing, warns = jax.local_device_count() * hosts.count(own), hosts.index(own) == peers.index
        held, added, total, available = sharing * held, sharing * added, total_bytes(), available_bytes()
        if sharing == 1 and _KEPT * added > available:
            return_freed_memory()
    else:
        where = f"each device of {peers.name_of(peers.index)}"
        total = device_memory({"limit": "bytes_limit"}).get("limit", math.inf)
        available = total - held
    fix, batch = _fix(job, added / max(_CAUTIOUS * available, 1.0)), job.run.train.global_batch
    room = f"{where} has {format_bytes(total)}, {format_bytes(available)} of it free"
    line = f"train.global_batch={batch}: {what} needs {format_bytes(held + added)} of memory, and {room}"
    if _CERTAIN * (held + added) > total:
        raise ConfigError(f"{line}; {fix}")
    if added > available and warns:
        _log.warning("%s: the run may be killed; %s", line, fix)


def _fix(job: Job, ratio: float) -> str:
    """Suggests a batch with which a program needs `ratio` times less memory, and what may do in place of it."""
    train = job.run.train
    rows = int(job.program.rows_per_device) // train.accumulate  # of a microbatch
    parts = next((parts for parts in range(2, rows + 1) if parts >= ratio and rows % parts == 0), None)
    use = "a smaller model, or more devices" if parts is None else f"train.global_batch={train.global_batch // parts}"
    tries = ["model.remat=full"] if getattr(job.run.model, "remat", "full") != "full" else []
    if job.run.guard.replay_every is not None:  # which needs the state twice
        tries.append("guard.replay_every=none")
    if parts is not None and train.canonical is None:
        tries.insert(0, f"train.accumulate={train.accumulate * parts}")
    return f"use {use}{f', or try {" or ".join(tries)}' if tries else ''}"
