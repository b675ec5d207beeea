"""Reads numbers of the command line."""

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
