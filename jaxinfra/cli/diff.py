"""`python -m launch diff A B`: prints the fields that differ between two configs or run records."""

import argparse

from jaxinfra.config import diff, encode, format_diff, load
from jaxinfra.config.source import record_with_classes


def run(options: argparse.Namespace) -> None:
    """Prints one line per field that differs; imports no classes that a record names."""
    records = [(path, record_with_classes(path)) for path in (options.left, options.right)]
    left, right = (record["config"] if record else encode(load(path).run) for path, record in records)
    differences = diff(left, right)
    print(format_diff(differences) if differences else "no difference")
