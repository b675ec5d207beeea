"""Arguments that several commands take, and what they say of them. Imports nothing heavy."""

import argparse

from jaxinfra.cli.numbers import add_int

CONFIG_HELP = "a config file, or the directory or URL of a run (or its run.json)"
RUN_HELP = "directory or URL of a run, such as runs/quickstart"
CHECKPOINT_HELP = f"{RUN_HELP}, or runs/quickstart@200 for the checkpoint of step 200"
HUB_HELP = "published weights: hf:DIR, hf:ORG/NAME of the Hugging Face Hub, or hf:s3://BUCKET/DIR"


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a command that several processes run together."""
    several = parser.add_argument_group("several processes")
    what = "start N processes on this machine, which share its devices (default %(default)s)"
    add_int(several, "--processes", 1, default=1, metavar="N", help=what)
    what = "where process 0 listens; Cloud TPU, Slurm, MPI and Kubernetes tell this and the next two by themselves"
    several.add_argument("--coordinator", metavar="HOST:PORT", help=what)
    add_int(several, "--process-id", 0, metavar="I", help="index of this process")
    add_int(several, "--of", 1, metavar="N", help="number of processes")
    what = "longest wait for all processes to join (default %(default)s)"
    add_int(several, "--join-timeout", 1, default=300, metavar="S", help=what)
    what = "silence after which a process counts as lost (default %(default)s)"
    add_int(several, "--heartbeat-timeout", 3, default=30, metavar="S", help=what)


def add_imports(parser: argparse.ArgumentParser) -> None:
    """Adds the option that allows classes of a user in a record."""
    what = "allow the classes of this module, or of this file and its folder, in a run.json; repeatable"
    parser.add_argument("--import", dest="imports", metavar="MODULE|FILE", action="append", default=[], help=what)
