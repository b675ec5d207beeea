"""Starts the processes that measure, and reads what they print.

Each case is a process of its own, because the number of emulated CPU devices is fixed when JAX starts.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from jaxinfra.errors import ConfigError, JaxinfraError
from jaxinfra.runtime.emulation import emulation_env

type Times = dict[str, list[float]]
"""Seconds of each timed round, by side: "jaxinfra", "baseline" or another thing that is compared."""


class BenchmarkProcessError(JaxinfraError):
    """A measuring process failed; the message contains the last line that it printed."""

    def __init__(self, command: Sequence[str], stderr: str):
        reason = (stderr.strip().splitlines() or ["no error message"])[-1]
        super().__init__(f"{' '.join(command)} failed: {reason}; run this command alone to see all of its output")


def emulated_env(num_devices: int) -> dict[str, str]:
    """Returns the environment of a process with emulated CPU devices."""
    return {**os.environ, **emulation_env(num_devices)}


def run_command(command: Sequence[str], env: Mapping[str, str]) -> str:
    """Runs a command and returns its stdout; raises the command's ConfigError, or BenchmarkProcessError."""
    process = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if process.returncode == ConfigError.exit_code:
        raise ConfigError(process.stderr.strip().splitlines()[-1].removeprefix("error: "))
    if process.returncode or not process.stdout.strip():
        raise BenchmarkProcessError(command, process.stderr)
    return process.stdout


def last_line(command: Sequence[str], num_devices: int) -> str:
    """Runs a command with emulated devices and returns the last line that it prints."""
    return run_command(command, emulated_env(num_devices)).splitlines()[-1]


def run_module(module: str, num_devices: int, **request: object) -> str:
    """Runs `python -m jaxinfra.bench.MODULE REQUEST`, with the request in JSON, and returns its last line."""
    return last_line([sys.executable, "-m", f"jaxinfra.bench.{module}", json.dumps(request)], num_devices)
