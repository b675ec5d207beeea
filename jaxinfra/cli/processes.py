"""`--processes N` and `--supervise`: runs a command in other processes on this machine, once or again and again.

It asks JAX for no devices, which those processes take. A supervisor does not even import it.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jaxinfra.cli.arguments import COMMANDS
from jaxinfra.errors import ConfigError, PeerLostError, StorageError, error_of_code
from jaxinfra.launchers.elastic import ElasticStarts
from jaxinfra.launchers.launcher import ProcessExit, launch
from jaxinfra.launchers.local_processes import process_environments
from jaxinfra.launchers.places.on_host import RUN_DIR
from jaxinfra.launchers.restart_policy import RestartLimits
from jaxinfra.launchers.rounds import Bounds
from jaxinfra.launchers.supervisor import Attempt, EqualStarts, Starts, supervise
from jaxinfra.machine.platforms import default_platform
from jaxinfra.processes import tpu_metadata
from jaxinfra.processes.discovery import Processes, find_processes
from jaxinfra.processes.door import SECRET
from jaxinfra.processes.run_secret import run_secret
from jaxinfra.processes.schedulers import hosts_per_slice
from jaxinfra.storage.location import is_remote
from jaxinfra.storage.mirror import Mirror
from jaxinfra.storage.objects import ObjectStore
from jaxinfra.track.attempts import AttemptLog

MAIN = "import sys; from jaxinfra.cli.entry import main; sys.exit(main())"
"""A program that is the command line, for a process that is started from elsewhere."""
_OPTIONS_OF_ONE = ("coordinator", "process_id", "of")  # options of a process among several


def run(options: argparse.Namespace) -> int:
    """Starts the processes of this host with their share of the devices; returns the exit code of the run."""
    if options.processes > 1:
        check_options(options)
    return _run_again(options) if options.command == "train" and options.supervise else _run_once(options)


def _run_once(options: argparse.Namespace) -> int:
    from jaxinfra.cli import run_location  # imports JAX, which the supervisor must not

    COMMANDS[options.command].check(options)
    environments = process_environments(options.processes, options.devices)
    command = child_command(options.argv, share_of_devices(options.devices, environments))
    location = run_location.run_location(options)
    if location is None:
        return launch(command, environments, None)
    with logs_folder(f"{location}/logs") as (logs, _):
        return launch(command, environments, logs)


def _run_again(options: argparse.Namespace) -> int:
    """Starts the processes until there is nothing to start again; returns the last exit code."""
    is_several = options.processes > 1
    among = {"coordinator": options.coordinator, "process_id": options.process_id, "of": options.of}
    found = None if is_several else find_processes(os.environ, **among)
    if options.elastic is not None:
        _check_elastic(options, found)
    secret: dict[str, str] = {}

    def environments() -> Sequence[Mapping[str, str]]:
        return process_environments(options.processes, options.devices) if is_several else [secret]

    devices, is_elastic = share_of_devices(options.devices, environments()), options.elastic is not None
    command = child_command(options.argv, devices, is_elastic=is_elastic)
    asked = ask_run(options.argv) if options.elastic or RUN_DIR not in os.environ else {}
    location = os.environ.pop(RUN_DIR, None) or asked["location"]
    if found is not None and not os.environ.get(SECRET):
        secret[SECRET] = run_secret(location)
    attempts = AttemptLog(location)
    starts: Starts = EqualStarts(
        command=command, environments=environments, first_rank=0 if found is None else found.index
    )
    if found is not None and is_elastic:
        starts = _elastic_starts(options, found, location, command, secret, asked["overrides"])

    def record(attempt: Attempt) -> None:
        first = 0 if attempt.hosts is None else attempt.hosts["hosts"][0]["index"]
        if found is None or found.index == first:
            attempts.append(asdict(attempt))

    with logs_folder(f"{location}/logs") as (logs, logs_location):
        limits = RestartLimits(max_per_hour=options.max_restarts_per_hour)
        return supervise(starts, logs, logs_location, limits, record)


def _elastic_starts(
    options: argparse.Namespace,
    found: Processes,
    location: str,
    command: Sequence[str],
    secret: Mapping[str, str],
    overrides: Mapping[str, Sequence[str]],
) -> ElasticStarts:
    slices = {name: value for name, value in os.environ.items() if name.startswith("MEGASCALE_")}
    environment = {**secret, **slices, **tpu_metadata.read_variables(os.environ)}
    least, most = options.elastic
    bounds = Bounds(
        least=least,
        most=most,
        together=hosts_per_slice(environment, most) if default_platform() == "tpu" else 1,
        overrides={int(hosts): words for hosts, words in overrides.items()},
        wait_s=options.elastic_wait,
        join_s=options.join_timeout,
        silence_s=options.heartbeat_timeout,
    )

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    return ElasticStarts(location, found, bounds, command, environment, say)


def _check_elastic(options: argparse.Namespace, found: Processes | None) -> None:
    """Raises ConfigError unless there is one process a host, and as many as --elastic has at most."""
    least, most = options.elastic
    asked = f"--elastic {least}..{most}"
    if options.processes > 1:
        raise ConfigError(f"{asked}: is for several hosts with one process each; leave out --processes")
    if found is not None and len({*found.hosts}) < len(found.hosts):
        raise ConfigError(
            f"{asked}: several processes were started on one host; start one on each, for all its devices"
        )
    if found is None or found.count != most:
        started = "one process" if found is None else f"{found.count} processes"
        raise ConfigError(
            f"{asked}: {started} of this run {'was' if found is None else 'were'} started; start the same command on "
            f"{most} hosts, or with --coordinator HOST:PORT --process-id N --of {most} for each"
        )


def ask_location(argv: Sequence[str]) -> str | None:
    """Returns the directory or URL of the run, None without one."""
    return ask_run(argv)["location"]


def ask_run(argv: Sequence[str], tries: int = 3) -> dict[str, Any]:
    """Returns what `run_location` finds; asks another process.

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
        return ask_run(argv, tries - 1)
    if asked.returncode:
        raise SystemExit(asked.returncode)  # it has printed its traceback
    found = json.loads(asked.stdout)
    if "error" in found:
        raise error_of_code(*found["error"])
    return found


def check_options(options: argparse.Namespace) -> None:
    """Raises ConfigError if there are options of one process among several."""
    for name in _OPTIONS_OF_ONE:
        if (value := getattr(options, name)) is not None:
            option = f"--{name.replace('_', '-')} {value}"
            raise ConfigError(f"{option}: is for one of several processes, --processes starts all; leave out one")


def share_of_devices(devices: str | None, environments: Sequence[Mapping[str, str]]) -> str | None:
    """Returns the value of --devices for one of the processes."""
    count = environments[0].get("JAX_NUM_CPU_DEVICES")
    return devices if count is None else f"cpu:{count}"


@contextmanager
def logs_folder(location: str) -> Iterator[tuple[Path, str]]:
    """Returns a folder for the logs of a run, and its path or URL for people; a bucket gets copies."""
    if not is_remote(location):
        yield Path(location), location
        return
    with TemporaryDirectory(prefix="jaxinfra-logs-") as folder:
        # A folder of its own for each start: it may meet another start that goes on, and holds no lease.
        url = f"{location}/{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{os.getpid()}"
        mirror = Mirror(Path(folder), ObjectStore(url))
        try:
            yield Path(folder), url
        finally:
            try:
                mirror.close()  # copies the end of the logs
            except StorageError as error:  # only reported: the exit code is that of the run
                print(f"warning: {error}", file=sys.stderr)


def child_command(argv: Sequence[str], devices: str | None, *, is_elastic: bool = False) -> list[str]:
    """Returns the command line of one process: this one with other devices, alone and unsupervised."""
    parser = argparse.ArgumentParser(add_help=False)  # knows abbreviations, too
    parser.add_argument("--processes")
    parser.add_argument("--devices")
    parser.add_argument("--supervise", action="store_true")
    for option in ("--max-restarts-per-hour", "--elastic", "--elastic-wait"):
        parser.add_argument(option)
    if is_elastic:  # each start has other hosts
        for option in ("--coordinator", "--process-id", "--of"):
            parser.add_argument(option)
    words = parser.parse_known_args(argv)[1]
    program = sys.orig_argv[1 : len(sys.orig_argv) - len(argv)]  # such as -m launch
    if [*program, *argv] != sys.orig_argv[1:]:  # a script has called `main`
        program = ["-c", MAIN]
    return [sys.executable, *program, *words, *(["--devices", devices] if devices else [])]
