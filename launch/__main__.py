"""Runs the command line: in a clone, `python -m launch CONFIG` is `jaxinfra CONFIG`."""

import sys
from typing import TYPE_CHECKING

from jaxinfra.cli.entry import main

if TYPE_CHECKING:  # `main` imports it when signals are handled
    import argparse


def add_commands() -> None:
    """Adds to the commands of the package those that only a clone has, since they run its tests."""
    from jaxinfra.cli.arguments import COMMANDS, Command  # imported when signals are handled
    from launch.benches import add_benches

    add_benches()

    summary = "inject the fault matrix into small real runs on this machine, and show what happens"
    COMMANDS["faults"] = Command(add_faults, summary, "launch.faults")


def add_faults(parser: "argparse.ArgumentParser") -> None:
    """Adds the arguments of `faults`."""
    from pathlib import Path

    from jaxinfra.cli.arguments import add_int

    parser.set_defaults(devices="cpu:8")  # to restore on other meshes
    parser.add_argument("--only", metavar="ROWS", help="rows of the matrix, such as 19,20 (default: all)")
    what = "try the larger numbers of random places and moments, and longer outages: 25 minutes"
    parser.add_argument("--long", action="store_true", help=what)
    add_int(parser, "--soak", 1, metavar="N", help="inject N random faults in row 41 (default 3)")
    add_int(parser, "--seed", 0, metavar="N", help="of these (default: the time)")
    parser.add_argument("--keep", metavar="DIR", help="run in this new folder and keep it")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="insert the table into this Markdown page")


if __name__ == "__main__":
    sys.exit(main(add_commands))
