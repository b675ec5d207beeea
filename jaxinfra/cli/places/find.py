"""Finds the run at a place that a command names by its directory."""

import argparse

from jaxinfra.cli.places.lines import say
from jaxinfra.errors import ConfigError
from jaxinfra.launchers.places.controller import Controller
from jaxinfra.launchers.places.job import Attempts, Job
from jaxinfra.launchers.places.run_files import files_of
from jaxinfra.launchers.places.sources import place_of


def find(options: argparse.Namespace) -> tuple[Controller, Job, int]:
    """Returns the controller, job and number of the newest attempt; ConfigError if there was none."""
    location = options.run.rstrip("/")
    attempts = Attempts(files=files_of(location, options.workdir), location=location)
    number, job = attempts.newest()
    if job is None:
        fix = "start it by its config and --place, or name one elsewhere, such as HOST:/path/to/runs/NAME"
        raise ConfigError(f"{location}: was never started at a place; {fix}")
    return Controller(place_of(job, say), attempts, say), job, number
