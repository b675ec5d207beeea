"""`python -m launch data verify STORE`: reads all of a store and compares it with its hashes."""

import argparse

from jaxinfra.cli.data.location import store_location
from jaxinfra.data.store.store import Store
from jaxinfra.errors import DataError
from jaxinfra.storage.errors import DAMAGED_VERSION_FIX

_MAX_LISTED = 100


def run(options: argparse.Namespace) -> None:
    """Prints each damaged block and the amount that was checked; DataError if something is damaged."""
    store = Store.open(store_location(options.store), options.version)
    count = num_bytes = 0
    damages = []
    for size_bytes, damage in store.verify():
        count, num_bytes = count + 1, num_bytes + size_bytes
        if damage is not None:
            damages.append(damage)
            if len(damages) <= _MAX_LISTED:
                print(f"{damage.location}: {damage.cause}")
    if damages:
        raise DataError(
            f"{store}: {len(damages)} of {count} files and blocks are damaged, first {damages[0].location}; "
            f"{DAMAGED_VERSION_FIX}"
        )
    print(f"{store}: {count} files and blocks, {num_bytes:,} bytes, every hash fits")
