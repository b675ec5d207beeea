"""Refuses steps that need more memory than there is, before the first one, and explains an allocation that has failed.

A program needs the memory that the compiler has laid out for it, and its process some more. So a step is refused only
if that part alone is more than all memory of the host or the device; one that is more than what is free now starts with
a warning.
"""

import logging
import math
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

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
_KEPT = 2.2  # times the buffers of a step: the heap that keeps what it frees, measured with the quickstart
_CAUTIOUS = 0.5  # of the free memory: what a suggested value may need


class _Room(NamedTuple):
    """Bytes of one host of CPUs, or of one device.

    `key` tells it from all others; `where` is its name, which other hosts may have, too. `state` are the arguments of a
    step, which the processes hold already. While a step or an evaluation runs, `step` or `evaluation` come on top.
    There is memory of `total`, of which the processes can still get `available`.
    """

    key: str
    where: str
    state: float
    step: float
    evaluation: float
    total: float
    available: float


def check_step(job: Job, state: Any, batch: Any) -> None:
    """Raises ConfigError in all processes if a step or an evaluation cannot fit, and warns if it may not.

    All processes call it with the arguments of the first step, which finds its compiled program.
    """
    step, arguments = _program_bytes(job.program.train_step.lower(state, batch).compile())
    room = _tightest(job, arguments, step, 0)
    on_cpu, parts = job.program.partitioner.platform == "cpu", job.run.train.accumulate
    if on_cpu and room.step * parts > _CAUTIOUS * room.available:  # an evaluation needs less, but in one part
        room = _tightest(job, arguments, step, _evaluation_bytes(job)[0])
    if on_cpu and jax.local_device_count() == 1 and _KEPT * room.step > room.available:
        return_freed_memory()
    _compare(job, room)


def check_evaluation(job: Job) -> None:
    """Raises ConfigError in all processes if an evaluation cannot fit, and warns if it may not."""
    evaluation, arguments = _evaluation_bytes(job)
    _compare(job, _tightest(job, arguments, 0, evaluation))


@contextmanager
def out_of_memory_errors(job: Job) -> Iterator[None]:
    """Raises ConfigError with a fix for a program that has found no memory, while it is compiled or runs."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        cause, a_third = " ".join(str(error).split())[:300], 3 * _CAUTIOUS
        fix = _fix(job, _Room("", "", 0, step=a_third, evaluation=0, total=0, available=1))
        raise ConfigError(f"{_batch(job)} {cause}; {fix}") from error


def _program_bytes(program: jax.stages.Compiled) -> tuple[float, float]:
    """Returns the bytes that a program takes on a device beside its arguments, and those of its arguments."""
    stats: Any = program.memory_analysis()
    if stats is None:  # the platform does not tell
        return 0, 0
    added = stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return added, stats.argument_size_in_bytes


def _evaluation_bytes(job: Job) -> tuple[float, float]:
    program, state = job.program, job.program.state
    with program.on_mesh:
        lowered = program.eval_step.lower(evaluated_params(state), program.validation_batch, state.reference)
        return _program_bytes(lowered.compile())


def _tightest(job: Job, arguments: float, step: float, evaluation: float) -> _Room:
    """Returns the host, or on accelerators the device, with the least room; the arguments are bytes of one device."""
    peers, programs = job.peers, (arguments, step, evaluation)
    if job.program.partitioner.platform == "cpu":  # the devices of a host share its memory
        host, boot, scale = platform.node(), _BOOT.read_text() if _BOOT.exists() else "", jax.local_device_count()
        own = host + boot, host, *(scale * each for each in programs), total_bytes(), available_bytes()
    else:
        limit = device_memory({"limit": "bytes_limit"}).get("limit", math.inf)
        device = f"each device of {peers.name_of(peers.index)}"
        own = device, device, *programs, limit, limit - arguments
    # Processes compile for different times, and wait for each other as long as in their first step.
    rows = [_Room(*row) for row in peers.gather(own, wait_s=job.run.watchdog.compile_s or math.inf)]
    rooms = []
    for key in dict.fromkeys(row.key for row in rows):
        group = [row for row in rows if row.key == key]
        needs = {part: sum(getattr(row, part) for row in group) for part in ("state", "step", "evaluation")}
        rooms.append(group[0]._replace(**needs))
    return min(rooms, key=lambda room: room.available - max(room.step, room.evaluation))


def _compare(job: Job, room: _Room) -> None:
    for what, added in (("a train step", room.step), ("an evaluation", room.evaluation)):
        needed, total = format_bytes(room.state + added), format_bytes(room.total)
        line = f"{_batch(job)} {what} needs {needed} of memory, and {room.where} has {total}"
        if _CERTAIN * (room.state + added) > room.total:
            raise ConfigError(f"{line}; {_fix(job, room)}")
        if added > room.available and job.is_main:
            free = format_bytes(room.available)
            _log.warning("%s, of which %s are free: the run may be killed; %s", line, free, _fix(job, room))


def _batch(job: Job) -> str:
    return f"train.global_batch={job.run.train.global_batch}:"


def _fix(job: Job, room: _Room) -> str:
    """Suggests values with which a step and an evaluation need at most half of the free memory."""
    train, free = job.run.train, max(_CAUTIOUS * room.available, 1.0)
    rows = int(job.program.rows_per_device) // train.accumulate  # of a microbatch
    fixes = []
    if train.canonical is None and room.evaluation <= free and (parts := _parts(rows, room.step / free)):
        fixes.append(f"train.accumulate={train.accumulate * parts}")
    if parts := _parts(rows, max(room.step, room.evaluation) / free):
        fixes.append(f"train.global_batch={train.global_batch // parts}")
    use = ", or ".join(fixes or ["a smaller model", "more devices"])
    has_remat = getattr(job.run.model, "remat", "full") != "full"
    return f"use {use}{' (less is enough with model.remat=full)' if has_remat else ''}"


def _parts(rows: int, ratio: float) -> int | None:
    """Returns the smallest divisor of `rows` that is at least `ratio`, and 2; None if there is none."""
    return next((parts for parts in range(2, rows + 1) if parts >= ratio and rows % parts == 0), None)
