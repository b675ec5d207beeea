"""Runs the command line: in a clone, `python -m launch CONFIG` is `jaxinfra CONFIG`."""

import sys

from jaxinfra.cli.entry import main
from launch.commands import add_commands

if __name__ == "__main__":
    sys.exit(main(add_commands))
