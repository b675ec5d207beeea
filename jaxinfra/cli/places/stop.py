"""`runs stop RUN`: ends a run at its place for good, and deletes what was made for it."""

import argparse

from jaxinfra.cli.places.find import find
from jaxinfra.cli.places.lines import say
from jaxinfra.command import command_line


def run(options: argparse.Namespace) -> None:
    """Asks the run to save and leave, and waits for it."""
    controller, job, number = find(options)
    for host, state in controller.stop(job, number, kill=options.kill).items():
        if state.state == "away" and not job.place.create:  # what was made is deleted by now
            say(f"host {host}: no answer; the run may go on there")
    if controller.is_done(number):
        say(f"attempt {number} was done; nothing goes on")
        return
    again = command_line("runs", "resume", job.location)
    say(f"attempt {number} is stopped; {again} goes on, from a checkpoint if it has one")
