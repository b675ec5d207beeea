"""The processes that measure: how they are started, asked and understood.

The number of emulated CPU devices is fixed when JAX starts, so each case is a process of its own.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from jaxinfra.errors import ConfigError, JaxinfraError
from jaxinfra.runtime import emulation

type Times = dict[str, list[float]]
"""Seconds of every timed turn, by side."""


class ChildError(JaxinfraError):
    """A process that was to measure something failed; the message ends with the last it said."""

    def __init__(self, command: Sequence[str], said: str):
        last = said.strip().splitlines()[-1:] or ["it said nothing"]
        super().__init__(f"{' '.join(command)}: {last[0]}; run it by itself")


def environment(devices: int) -> dict[str, str]:
    """Returns the environment of a process with so many emulated CPU devices."""
    return {**os.environ, **emulation.emulation_env(devices)}


def output(command: Sequence[str], environment: dict[str, str]) -> str:
    """Runs a command to its end and returns what it prints; a ConfigError where it refused, else a ChildError."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == ConfigError.exit_code:
        raise ConfigError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))
    if done.returncode or not done.stdout.strip():
        raise ChildError(command, done.stderr)
    return done.stdout


def last_line(command: Sequence[str], devices: int) -> Any:
    """Runs a command as `output` does, and reads the last line that it prints, as JSON."""
    return json.loads(output(command, environment(devices)).splitlines()[-1])


def asked(module: str, devices: int, **request: Any) -> Any:
    """Returns the answer of `python -m jaxinfra.bench.MODULE REQUEST`, REQUEST in JSON."""
    return last_line([sys.executable, "-m", f"jaxinfra.bench.{module}", json.dumps(request)], devices)
