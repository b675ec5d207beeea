"""`--processes N`: runs a command in N processes on this machine. It asks JAX for no devices."""

import argparse
import io
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from jaxinfra.cli import bench, config_argument
from jaxinfra.errors import ConfigError, StorageError
from jaxinfra.run_dir import join_location
from jaxinfra.runtime.launcher import launch
from jaxinfra.runtime.local_processes import process_environments
from jaxinfra.storage.location import is_remote
from jaxinfra.storage.mirror import Mirror
from jaxinfra.storage.objects import ObjectStore
from jaxinfra.track.runs import parse_source, record_of

_MAIN = "import sys; from jaxinfra.cli.main import main; sys.exit(main())"
_OPTIONS_OF_ONE = ("coordinator", "process_id", "of")  # options of a process among several


def run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Starts the processes with their share of the devices, supervises them, and returns the exit code of the run."""
    for name in _OPTIONS_OF_ONE:
        if (value := getattr(options, name)) is not None:
            option = f"--{name.replace('_', '-')} {value}"
            raise ConfigError(f"{option}: is for one of several processes, --processes starts all; leave out one")
    if options.command == "bench":
        bench.check_options(options)
    environments = process_environments(options.processes, options.devices)
    devices = options.devices
    if "JAX_NUM_CPU_DEVICES" in environments[0]:
        devices = f"cpu:{environments[0]['JAX_NUM_CPU_DEVICES']}"
    command = child_command(argv, devices)
    location = _logs_location(options)
    if location is None or not is_remote(location):
        return launch(command, environments, None if location is None else Path(location))
    with TemporaryDirectory(prefix="jaxinfra-logs-") as folder:
        # A folder of its own for each start: it may meet another start that goes on, and holds no lease.
        start = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{os.getpid()}"
        mirror = Mirror(Path(folder), ObjectStore(f"{location}/{start}"))
        try:
            return launch(command, environments, Path(folder))
        finally:
            _close(mirror)


def _close(mirror: Mirror) -> None:
    """Copies the end of the logs; a failure is only reported, since the exit code is that of the run."""
    try:
        mirror.close()
    except StorageError as error:
        print(f"warning: {error}", file=sys.stderr)


def child_command(argv: Sequence[str], devices: str | None) -> list[str]:
    """Returns the command line of one process: this one with other devices and without --processes."""
    parser = argparse.ArgumentParser(add_help=False)  # knows abbreviations, too
    parser.add_argument("--processes")
    parser.add_argument("--devices")
    words = parser.parse_known_args(argv)[1]
    program = sys.orig_argv[1 : len(sys.orig_argv) - len(argv)]  # such as -m launch
    if [*program, *argv] != sys.orig_argv[1:]:  # a script has called `main`
        program = ["-c", _MAIN]
    return [sys.executable, *program, *words, *(["--devices", devices] if devices else [])]


def _logs_location(options: argparse.Namespace) -> str | None:
    """Returns the folder or URL of the logs in the run's directory; None for a command without a run."""
    if options.command == "train":
        return f"{_directory_of_config(options)}/logs"
    if "run_dir" not in options:
        return None
    location, _ = parse_source(options.run_dir)
    record_of(location)
    return f"{location}/logs"


def _directory_of_config(options: argparse.Namespace) -> str:
    environment = dict(os.environ)
    os.environ["JAX_PLATFORMS"] = "cpu"  # a config file that asks JAX for devices must not take those of the processes
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # the processes will say the same
            run = config_argument.load_config(options).run
    finally:
        os.environ.clear()
        os.environ.update(environment)
    return join_location(run.root, run.name)
