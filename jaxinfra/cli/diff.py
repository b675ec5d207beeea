"""`python -m launch diff A B`: prints the fields that differ between two configs or run records."""

import argparse
from typing import Any

from jaxinfra.config import diff, encode, format_diff, load
from jaxinfra.config.classes import ClassFinder
from jaxinfra.config.codec import complete
from jaxinfra.config.record import decode_record
from jaxinfra.config.source import record_of_source
from jaxinfra.run import Run


def run(options: argparse.Namespace) -> None:
    """Prints one line per field that differs; imports no classes that a record names."""
    differences = diff(_encoded(options.left), _encoded(options.right))
    print(format_diff(differences) if differences else "no difference")


def _encoded(source: str) -> dict[str, Any]:
    """Returns a config with all fields of now; paths in a record stay as the run was given them."""
    record = record_of_source(source)
    if record is None:
        return encode(load(source).run)
    if record.get("classes"):
        return complete(Run, record["config"])
    return encode(decode_record(source, record, ClassFinder()))
