"""`--processes N`: runs a command in N processes on this machine. It asks JAX for no devices."""

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from jaxinfra.errors import ConfigError, StorageError
from jaxinfra.launchers.launcher import launch
from jaxinfra.launchers.local_processes import process_environments
from jaxinfra.storage.location import is_remote
from jaxinfra.storage.mirror import Mirror
from jaxinfra.storage.objects import ObjectStore

_MAIN = "import sys; from jaxinfra.cli.entry import main; sys.exit(main())"
_OPTIONS_OF_ONE = ("coordinator", "process_id", "of")  # options of a process among several


def run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Starts the processes with their share of the devices, supervises them, and returns the exit code of the run."""
    from jaxinfra.cli import bench, run_location  # these import JAX, which the supervisor must not

    check_options(options)
    if options.command == "bench":
        bench.check_options(options)
    environments = process_environments(options.processes, options.devices)
    command = child_command(argv, share_of_devices(options.devices, environments))
    location = run_location.run_location(options)
    if location is None:
        return launch(command, environments, None)
    with logs_folder(f"{location}/logs") as (logs, _):
        return launch(command, environments, logs)


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
            _close(mirror)


def _close(mirror: Mirror) -> None:
    """Copies the end of the logs; a failure is only reported, since the exit code is that of the run."""
    try:
        mirror.close()
    except StorageError as error:
        print(f"warning: {error}", file=sys.stderr)


def child_command(argv: Sequence[str], devices: str | None) -> list[str]:
    """Returns the command line of one process: this one with other devices, alone and unsupervised."""
    parser = argparse.ArgumentParser(add_help=False)  # knows abbreviations, too
    parser.add_argument("--processes")
    parser.add_argument("--devices")
    parser.add_argument("--supervise", action="store_true")
    parser.add_argument("--max-restarts-per-hour")
    words = parser.parse_known_args(argv)[1]
    program = sys.orig_argv[1 : len(sys.orig_argv) - len(argv)]  # such as -m launch
    if [*program, *argv] != sys.orig_argv[1:]:  # a script has called `main`
        program = ["-c", _MAIN]
    return [sys.executable, *program, *words, *(["--devices", devices] if devices else [])]
