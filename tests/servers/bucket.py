"""An object store on this machine, whose faults a row sets."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from tests.servers.faulty_proxy import Faults, faulty
from tests.servers.gcs_emulator import TOKEN, Objects, emulated

_BUCKET = "bucket-of-faults"


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """A bucket of an emulator of Google Cloud Storage, behind a proxy.

    Attributes:
        url: of a folder in it.
        environment: leads processes to it.
        faults: what goes wrong on the way.
        objects: what is stored.
    """

    url: str
    environment: Mapping[str, str]
    faults: Faults
    objects: Objects


@contextmanager
def emulated_bucket() -> Iterator[Bucket]:
    """Runs the servers within this context."""
    with emulated(_BUCKET) as (port, objects), faulty(port) as (front, faults):
        url = f"http://127.0.0.1:{front}"
        environment = {
            "TENSORSTORE_GCS_HTTP_URL": url,
            "STORAGE_EMULATOR_HOST": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": TOKEN,
        }
        yield Bucket(url=f"gs://{_BUCKET}/runs", environment=environment, faults=faults, objects=objects)
