"""Finds the run at a place that a command names by its directory."""

import argparse

from jaxinfra.cli.places.lines import say
from jaxinfra.launchers.places.controller import Controller, require_job
from jaxinfra.launchers.places.job import Attempts, Job
from jaxinfra.launchers.places.run_files import files_of
from jaxinfra.launchers.places.sources import place_of


def find(options: argparse.Namespace) -> tuple[Controller, Job, int]:
    """Returns the controller, job and number of the newest attempt; ConfigError if there was none."""
    location = options.run.rstrip("/")
    attempts = Attempts(files=files_of(location, options.workdir), location=location)
    number, job = attempts.newest()
    job = require_job(number, job, location)
    return Controller(place_of(job, say), attempts, say), job, number
