"""Reads numbers of the command line. Imports nothing heavy."""

import argparse
from collections.abc import Callable

from jaxinfra.errors import ConfigError


def positive(option: str, example: str, *, unit: str = "", least: float = 0.0) -> Callable[[str], float]:
    """Returns a parser of numbers above 0, also written with their unit; it raises ConfigError with the example.

    `least` is the smallest number, if there is one.
    """

    def parse(text: str) -> float:
        try:
            number = float(text.removesuffix(unit))
        except ValueError:
            number = 0.0
        if not 0.0 < number < float("inf") or number < least:
            of, limit = " of days" if unit == "d" else "", f"of at least {least:g}" if least else "above 0"
            raise ConfigError(f"{option} {text}: expected a number{of} {limit}; use {option} {example}")
        return number

    return parse


def add_int(
    parser: argparse._ActionsContainer,
    option: str,
    minimum: int,
    *,
    alias: str | None = None,
    default: int | None = None,
    metavar: str | None = None,
    help: str,
) -> None:
    """Adds an integer option, maybe with another spelling; a value below `minimum` is a ConfigError."""

    def parse(text: str) -> int:
        if (value := int(text)) < minimum:
            raise ConfigError(f"{option} {value}: must be {minimum} or more; use {option} {minimum}")
        return value

    parse.__name__ = "int"  # argparse's message for a text that is not a number shows this name
    spellings = (option,) if alias is None else (option, alias)
    parser.add_argument(*spellings, type=parse, default=default, metavar=metavar, help=help)
