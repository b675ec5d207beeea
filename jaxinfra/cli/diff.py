"""`python -m launch diff A B`: prints the fields that differ between two configs or run records."""

import argparse
import os

from jaxinfra.config import diff, format_diff, load


def run(options: argparse.Namespace) -> None:
    """Prints one line per field that differs."""
    # A run.json may use the classes of the config file that it is compared with.
    files = [path for path in (options.left, options.right) if path.endswith(".py") and os.path.exists(path)]
    imports = [*options.imports, *files]
    left, right = (load(path, imports=imports, same_sources=False) for path in (options.left, options.right))
    differences = diff(left.run, right.run)
    print(format_diff(differences) if differences else "no difference")
