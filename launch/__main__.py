"""Runs the command line: in a clone, `python -m launch CONFIG` is `jaxinfra CONFIG`."""

import sys

from jaxinfra.cli.entry import main


def add_commands() -> None:
    """Adds the commands of a clone."""
    from launch import arguments  # imported when signals are handled

    arguments.add_commands()


if __name__ == "__main__":
    sys.exit(main(add_commands))
