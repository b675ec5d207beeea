"""`--supervise`: starts a run, in one process or in several, again after what it can go on from. It imports no JAX."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from jaxinfra.cli import processes
from jaxinfra.errors import PeerLostError, error_of_code
from jaxinfra.launchers.launcher import ProcessExit
from jaxinfra.launchers.local_processes import process_environments
from jaxinfra.launchers.restart_policy import RestartLimits
from jaxinfra.launchers.supervisor import Attempt, Supervised, supervise
from jaxinfra.processes.discovery import find_processes
from jaxinfra.processes.door import SECRET
from jaxinfra.processes.run_secret import run_secret
from jaxinfra.track.attempts import AttemptLog


def run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Starts the processes of this host until there is nothing to start again; returns the last exit code."""
    is_several = options.processes > 1
    if is_several:
        processes.check_options(options)
    among = {"coordinator": options.coordinator, "process_id": options.process_id, "of": options.of}
    found = None if is_several else find_processes(os.environ, **among)
    first_rank = 0 if found is None else found.index
    secret: dict[str, str] = {}

    def environments() -> Sequence[Mapping[str, str]]:
        return process_environments(options.processes, options.devices) if is_several else [secret]

    command = processes.child_command(argv, processes.share_of_devices(options.devices, environments()))
    location = run_location(argv)
    assert location is not None
    if found is not None and not os.environ.get(SECRET):
        secret[SECRET] = run_secret(location)
    attempts = AttemptLog(location)

    def record(attempt: Attempt) -> None:
        if first_rank == 0:
            attempts.append(asdict(attempt))

    with processes.logs_folder(f"{location}/logs") as (logs, logs_location):
        what = Supervised(
            command=command, environments=environments, logs=logs, logs_location=logs_location, first_rank=first_rank
        )
        return supervise(what, RestartLimits(max_per_hour=options.max_restarts_per_hour), record)


def run_location(argv: Sequence[str], tries: int = 3) -> str | None:
    """Returns the directory or URL of the run, None without one; asks another process.

    Loading a config imports JAX, and its file may ask that for devices, before the processes have joined.
    """
    command = [sys.executable, "-m", "jaxinfra.cli.run_location", *argv]
    # In a session of its own: Ctrl-C ends this process alone, which says so in one line.
    asked = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, start_new_session=True)
    if asked.returncode < 0:
        end = f"the process that finds the run's directory {ProcessExit(rank=0, code=asked.returncode).text}"
        if tries == 1:
            raise PeerLostError(f"{end} each time; find out what kills it, such as too little memory, and start again")
        print(f"warning: {end}; starting it again", file=sys.stderr)
        return run_location(argv, tries - 1)
    if asked.returncode:
        raise SystemExit(asked.returncode)  # it has printed its traceback
    found = json.loads(asked.stdout)
    if "error" in found:
        raise error_of_code(*found["error"])
    return found["location"]
