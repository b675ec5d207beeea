"""`python -m launch data verify STORE`: read all of it, and compare it with its hashes."""

import argparse
from collections.abc import Sequence

from jaxinfra.data.store.store import Store
from jaxinfra.errors import DataError
from jaxinfra.storage.errors import DAMAGED_VERSION_FIX

_LISTED = 100


def run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Prints each damaged block, and how much was looked at; DataError where something is damaged."""
    store = Store.open(options.store, options.version)
    looked_at = n_bytes = 0
    damages = []
    for _, size_bytes, damage in store.verify():
        looked_at, n_bytes = looked_at + 1, n_bytes + size_bytes
        if damage is not None:
            damages.append(damage)
            if len(damages) <= _LISTED:
                print(damage)
    if damages:
        raise DataError(
            f"{store}: {len(damages)} of {looked_at} files and blocks are damaged, first {damages[0].place}; "
            f"{DAMAGED_VERSION_FIX}"
        )
    print(f"{store}: {looked_at} files and blocks, {n_bytes:,} bytes, every hash fits")
    return 0
