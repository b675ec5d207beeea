"""Reads numbers of the command line."""

from collections.abc import Callable

from jaxinfra.errors import ConfigError


def positive(option: str, example: str, *, unit: str = "") -> Callable[[str], float]:
    """Returns a parser of numbers above 0, also written with their unit; it raises ConfigError with the example."""

    def parse(text: str) -> float:
        try:
            number = float(text.removesuffix(unit))
        except ValueError:
            number = 0.0
        if not 0.0 < number < float("inf"):
            of = " of days" if unit == "d" else ""
            raise ConfigError(f"{option} {text}: expected a number{of} above 0; use {option} {example}")
        return number

    return parse
