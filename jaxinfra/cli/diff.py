"""`python -m launch diff A B`: what differs between two configs or run records."""

import argparse
from collections.abc import Sequence

from jaxinfra.config import diff, format_diff, load


def run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Prints a line for each field that differs; nothing differs: says so."""
    differences = diff(load(options.left).run, load(options.right).run)
    print(format_diff(differences) if differences else "no difference")
    return 0
