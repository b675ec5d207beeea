"""`python -m launch data show STORE`: shows what a store holds."""

import argparse

from jaxinfra.cli.data.describe import describe_manifest, label_histogram, length_histogram
from jaxinfra.cli.data.location import store_location
from jaxinfra.data.inspect import sample_documents
from jaxinfra.data.store.store import Store, TokenStore
from jaxinfra.data.store.versions import list_versions
from jaxinfra.storage.objects import ObjectStore


def run(options: argparse.Namespace) -> None:
    """Prints versions, counts, lengths and samples; ConfigError for a config file that names no store, or several."""
    location = store_location(options.store)
    store = Store.open(location, options.version)
    print(f"store        {store}")
    print("\n".join(describe_manifest(store.manifest)))
    for version in list_versions(ObjectStore(location)):
        print(f"version      {version.fingerprint}  {version.created}")
    if store.manifest.kind == "images":
        print("\n".join(label_histogram(store)))
        return
    text = TokenStore(store.storage, store.manifest)
    print("\n".join([*length_histogram(text), *sample_documents(text, options.samples, options.chars)]))
