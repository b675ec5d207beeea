"""`--supervise`: starts a run, in one process or in several, again after what it can go on from. It imports no JAX."""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from jaxinfra.bench.subprocesses import call_in_process
from jaxinfra.cli import processes
from jaxinfra.runtime.local_processes import process_environments
from jaxinfra.runtime.processes import find_processes
from jaxinfra.runtime.restart_policy import RestartLimits
from jaxinfra.runtime.supervisor import Attempt, Supervised, supervise
from jaxinfra.track.attempts import AttemptLog


def run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Starts the processes of this host until there is nothing to start again; returns the last exit code."""
    environments: list[Mapping[str, str]] = [{}]
    first_rank = 0
    if options.processes > 1:
        processes.check_options(options)
        environments = [*process_environments(options.processes, options.devices)]
    elif found := find_processes(
        os.environ, coordinator=options.coordinator, process_id=options.process_id, of=options.of
    ):
        first_rank = found.index
    command = processes.child_command(argv, processes.share_of_devices(options.devices, environments))
    location = call_in_process(_run_location, {}, options)
    attempts = AttemptLog(location)

    def record(attempt: Attempt) -> None:
        if first_rank == 0:
            attempts.append(asdict(attempt))

    with processes.logs_folder(f"{location}/logs") as (logs, logs_location):
        what = Supervised(
            command=command,
            environments=lambda: (
                process_environments(options.processes, options.devices) if options.processes > 1 else [{}]
            ),
            logs=logs,
            logs_location=logs_location,
            first_rank=first_rank,
        )
        return supervise(what, RestartLimits(max_per_hour=options.max_restarts_per_hour), record)


def _run_location(options: argparse.Namespace) -> str:
    from jaxinfra.cli.run_location import run_location  # imports JAX, in a process of its own

    location = run_location(options)
    assert location is not None, "training has a run"
    return location
