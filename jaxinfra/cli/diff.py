"""`python -m launch diff A B`: prints the fields that differ between two configs or run records."""

import argparse
from typing import Any

from jaxinfra.config import diff, encode, format_diff, load, read_record
from jaxinfra.config.classes import ClassFinder
from jaxinfra.config.record import config_without_classes, decode_record
from jaxinfra.config.source import find_record


def run(options: argparse.Namespace) -> None:
    """Prints one line per field that differs; imports no classes that a record names."""
    differences = diff(_encoded(options.left), _encoded(options.right))
    print(format_diff(differences) if differences else "no difference")


def _encoded(source: str) -> dict[str, Any]:
    """Returns a config with all fields of now; paths in a record stay as the run was given them."""
    path = find_record(source)
    if path is None:
        return encode(load(source).run)
    record = read_record(path)
    if record.get("classes"):
        return config_without_classes(record)
    return encode(decode_record(path, record, ClassFinder()))
