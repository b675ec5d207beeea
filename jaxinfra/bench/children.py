"""The processes that measure: how they are started, asked and understood.

The number of emulated CPU devices is fixed when JAX starts, so each case is a process of its own.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from jaxinfra.errors import ConfigError, JaxinfraError
from jaxinfra.runtime import emulated

type Times = dict[str, list[float]]
"""Seconds of every timed turn, by side."""


class ChildError(JaxinfraError):
    """A process that was to measure something failed; the message ends with the last it said."""

    def __init__(self, command: Sequence[str], said: str):
        last = said.strip().splitlines()[-1:] or ["it said nothing"]
        super().__init__(f"{' '.join(command)}: {last[0]}; run it by itself")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What to measure.

    Attributes:
        kind: a key of `measure.KINDS`, or `meshes`.
        config: path of the config file.
        overrides: changes to it; they size the mesh, too.
        pairs: timed turns of each side.
        plain: of `meshes`, the overrides of the other side.
    """

    kind: str
    config: str
    overrides: list[str]
    pairs: int
    plain: list[str] | None = None


def environment(devices: int) -> dict[str, str]:
    """The environment of a process with so many emulated CPU devices."""
    return {**os.environ, **emulated.environment(devices)}


def last_line(command: Sequence[str], devices: int) -> Any:
    """Runs a command to its end and reads the last line that it prints, as JSON.

    Raises:
        ConfigError: it refused what it was asked.
        ChildError: it failed.
    """
    done = subprocess.run(command, env=environment(devices), capture_output=True, text=True, check=False)
    if done.returncode == ConfigError.exit_code:
        raise ConfigError(done.stderr.strip().splitlines()[-1])
    if done.returncode or not done.stdout.strip():
        raise ChildError(command, done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measured(request: Request, devices: int) -> Any:
    """The answer of `jaxinfra.bench.measure` in a process with so many devices."""
    words = json.dumps(dataclasses.asdict(request))
    return last_line([sys.executable, "-m", "jaxinfra.bench.measure", words], devices)
