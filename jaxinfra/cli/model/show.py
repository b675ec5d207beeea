"""`python -m launch model show models:/NAME`: lists the versions of a model, and which is in use."""

import argparse

from rich.table import Column
from rich.text import Text

from jaxinfra.cli.model.promote import open_registry
from jaxinfra.errors import ConfigError
from jaxinfra.track.console import print_table, stdout_console, titled_table
from jaxinfra.track.formatting import format_metric


def run(options: argparse.Namespace) -> None:
    """Prints a table of the versions, the newest first."""
    registry = open_registry(options.registry, options.target)
    if not registry.exists():
        raise ConfigError(f"models:/{registry.model}: no such model in {registry.uri}; model promote registers one")
    champion, versions = registry.champion(), registry.versions()
    names = list(dict.fromkeys(name for each in versions for name in each.metrics))
    columns = [Column(Text(name), justify="right") for name in names]
    table = titled_table("", "version", registry.alias, Column("run", overflow="fold"), *columns)
    for each in versions:
        values = [format_metric(each.metrics[name]) if name in each.metrics else "" for name in names]
        in_use = champion is not None and each.number == champion.number
        table.add_row(each.number, "<-" if in_use else "", Text(each.source), *values)
    print_table(stdout_console(), table)
