"""The secret of the processes of a run that are started one by one: the first of them writes it beside the run."""

import re
from pathlib import Path

from jaxinfra.errors import ConfigError
from jaxinfra.processes.door import SECRET, new_secret
from jaxinfra.storage.atomic import create_file
from jaxinfra.storage.errors import storage_errors
from jaxinfra.storage.location import is_remote

FILE = ".secret"
_IN_ALL = f"set {SECRET} to the same random text in all processes"


def run_secret(location: str) -> str:
    """Returns the secret in a run directory or URL, and writes one if there is none; on a disk only its owner reads it.

    Raises StorageError if it cannot be read or written, ConfigError if it is damaged.
    """
    where, new = f"{location}/{FILE}", f"{new_secret()}\n".encode()
    if is_remote(location):
        from jaxinfra.storage.objects import ObjectStore  # imports TensorStore, which takes time

        store = ObjectStore(location)
        secret = store.read_or_none(FILE)
        if secret is None:
            store.create(FILE, new)
            secret = store.read(FILE)
    else:
        path = Path(where)
        with storage_errors(path, action="read or written", fix=f"{_IN_ALL}, or let this user read and write there"):
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                create_file(path, new, mode=0o600)
            secret = path.read_bytes()
    if not re.fullmatch(rb"[0-9a-f]{64}\n", secret):
        raise ConfigError(f"{where}: no secret of 64 hexadecimal digits; delete it, or {_IN_ALL}")
    return secret.decode().strip()
