"""`python -m launch data show STORE`: what a store holds."""

import argparse
from collections.abc import Sequence

from jaxinfra.cli.config_argument import add_number, add_store


def arguments(parser: argparse.ArgumentParser) -> None:
    """The store, the version, and how much of it."""
    add_store(parser)
    add_number(parser, "--samples", 0, default=2, help="documents to show of each split (default %(default)s)")
    add_number(parser, "--chars", 0, default=300, help="of each (default %(default)s)")


def run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Prints versions, counts, lengths and samples."""
    from jaxinfra.data.inspect import facts, histogram, labels, samples
    from jaxinfra.data.store.store import Store, TokenStore
    from jaxinfra.data.store.versions import listed
    from jaxinfra.storage.objects import Storage

    store = Store.open(options.store, options.version)
    print(f"store        {store}")
    print("\n".join(facts(store.manifest)))
    for version in listed(Storage(options.store)):
        print(f"version      {version.fingerprint}  {version.created}")
    if store.manifest.kind == "images":
        print("\n".join(labels(store)))
        return 0
    text = TokenStore(store.storage, store.manifest)
    print("\n".join([*histogram(text), *samples(text, options.samples, options.chars)]))
    return 0
