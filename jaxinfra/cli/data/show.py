"""`python -m launch data show STORE`: what a store holds."""

import argparse
from collections.abc import Sequence

from jaxinfra.data.inspect import facts, histogram, labels, samples
from jaxinfra.data.store.store import Store, TokenStore
from jaxinfra.data.store.versions import listed
from jaxinfra.storage.objects import ObjectStore


def run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Prints versions, counts, lengths and samples."""
    store = Store.open(options.store, options.version)
    print(f"store        {store}")
    print("\n".join(facts(store.manifest)))
    for version in listed(ObjectStore(options.store)):
        print(f"version      {version.fingerprint}  {version.created}")
    if store.manifest.kind == "images":
        print("\n".join(labels(store)))
        return 0
    text = TokenStore(store.storage, store.manifest)
    print("\n".join([*histogram(text), *samples(text, options.samples, options.chars)]))
    return 0
