"""`python -m launch model audit LOCATION`: lists what was done to models and data, and checks that it is all there."""

import argparse

from rich.table import Column
from rich.text import Text

from jaxinfra.storage import audit
from jaxinfra.track.console import print_table, stdout_console, titled_table


def run(options: argparse.Namespace) -> None:
    """Prints all entries and the hash of the newest one; raises DataError if the chain is broken."""
    entries = audit.verify(options.location)
    table = titled_table("", "entry", "time", "who", "action", Column("subject", overflow="fold"))
    for each in entries:
        table.add_row(str(each.number), *map(Text, (each.time, each.who, each.action, each.subject)))
    print_table(stdout_console(), table)
    print(f"{len(entries)} entries, none changed; the newest is {entries[-1].digest}")
