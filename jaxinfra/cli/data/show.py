"""`python -m launch data show STORE`: shows what a store holds."""

import argparse
from collections.abc import Sequence

from jaxinfra.data.inspect import describe_manifest, label_histogram, length_histogram, sample_documents
from jaxinfra.data.store.store import Store, TokenStore
from jaxinfra.data.store.versions import list_versions
from jaxinfra.storage.objects import ObjectStore


def run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Prints versions, counts, lengths and samples."""
    store = Store.open(options.store, options.version)
    print(f"store        {store}")
    print("\n".join(describe_manifest(store.manifest)))
    for version in list_versions(ObjectStore(options.store)):
        print(f"version      {version.fingerprint}  {version.created}")
    if store.manifest.kind == "images":
        print("\n".join(label_histogram(store)))
        return 0
    text = TokenStore(store.storage, store.manifest)
    print("\n".join([*length_histogram(text), *sample_documents(text, options.samples, options.chars)]))
    return 0
