"""The commands that only a clone has, since they run its tests."""

import argparse
from pathlib import Path


def add_commands() -> None:
    """Adds them to those of the package."""
    from jaxinfra.cli.arguments import add_command  # imported when signals are handled

    summary = "inject the fault matrix into small real runs on this machine, and show what happens"
    add_command("faults", add_faults, summary, module="launch.faults")


def add_faults(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `faults`."""
    from jaxinfra.cli.arguments import add_int

    parser.set_defaults(devices="cpu:8")  # to restore on other meshes
    parser.add_argument("--only", metavar="ROWS", help="rows of the matrix, such as 19,20 (default: all)")
    what = "try the larger numbers of random places and moments, and longer outages: 25 minutes"
    parser.add_argument("--long", action="store_true", help=what)
    add_int(parser, "--soak", 1, metavar="N", help="inject N random faults in row 41 (default 3)")
    add_int(parser, "--seed", 0, metavar="N", help="of these (default: the time)")
    parser.add_argument("--keep", metavar="DIR", help="run in this new folder and keep it")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="insert the table into this Markdown page")
