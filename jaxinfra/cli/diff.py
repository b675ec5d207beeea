"""`python -m launch diff A B`: what differs between two configs or run records."""

import argparse
import os
from collections.abc import Sequence

from jaxinfra.config import diff, format_diff, load


def run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Prints a line for each field that differs; nothing differs: says so."""
    files = [path for path in (options.left, options.right) if path.endswith(".py") and os.path.exists(path)]
    imports = [*options.imports, *files]
    left, right = (load(path, imports=imports, same_sources=False) for path in (options.left, options.right))
    differences = diff(left.run, right.run)
    print(format_diff(differences) if differences else "no difference")
    return 0
