"""Finds the directory of the run that a command line names, which takes loading its config, and so importing JAX.

For an elastic run it also finds the overrides for each number of hosts.
"""

import argparse
import io
import json
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

from jaxinfra.cli import config_argument, sweep
from jaxinfra.cli.main import parse_command_line
from jaxinfra.config import validate
from jaxinfra.interop.folder import is_published
from jaxinfra.launchers.local_processes import local_devices
from jaxinfra.run import Run
from jaxinfra.run.elastic import elastic_overrides
from jaxinfra.run_dir import join_location
from jaxinfra.storage.credentials import mask_stderr
from jaxinfra.track.runs import parse_source, record_of
from jaxinfra.user_code import ending_of


def run_location(options: argparse.Namespace) -> str | None:
    """Returns the directory or URL of the run; None for a command without a run of its own."""
    if options.command == "train" and options.sweep:
        return sweep.folder(options)
    if options.command == "train":
        run = _load(options)
        return join_location(run.root, run.name)
    if "run_dir" not in options or is_published(options.run_dir):
        return None
    location, _ = parse_source(options.run_dir)
    record_of(location)
    return location


def _load(options: argparse.Namespace) -> Run:
    """Returns the config, validated."""
    environment = dict(os.environ)
    os.environ["JAX_PLATFORMS"] = "cpu"  # a config file that asks JAX for devices must not take those of the processes
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # the processes will say the same
            run = config_argument.load_config(options).run
            validate(run)  # before a folder has a name from it, which may contain a password
    finally:
        os.environ.clear()
        os.environ.update(environment)
    return run


def _print_location(argv: list[str]) -> None:
    """Prints where the run is, or the exit code and message of an error, as JSON."""
    try:
        options = parse_command_line(argv)
        found: dict[str, Any] = {"location": run_location(options)}
        if (hosts := getattr(options, "elastic", None)) is not None:
            least, most = hosts
            listed = os.environ.get("JAX_LOCAL_DEVICE_IDS")
            devices = len(listed.split(",")) if listed else local_devices()
            found["overrides"] = elastic_overrides(_load(options), least, most, devices)
    except Exception as error:
        if (ending := ending_of(error)).code == 1:  # a bug
            raise
        found = {"error": ending}
    print(json.dumps(found))


if __name__ == "__main__":
    mask_stderr()
    _print_location(sys.argv[1:])
