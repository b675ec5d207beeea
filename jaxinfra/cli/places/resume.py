"""`runs resume RUN`: watches a run at its place from this machine, and starts it again if it does not live."""

import argparse

from jaxinfra.cli.places.find import find
from jaxinfra.cli.places.lines import watching


def run(options: argparse.Namespace) -> int:
    """Takes the run over; returns its exit code."""
    controller, job, number = find(options)
    job.secret_values()
    with watching(job.location):
        job, number = controller.take_over(job, number)
        return controller.follow(job, number)
