"""Packs the code of a run, and its secrets, for the nodes of a Ray cluster. What runs there imports no more than this.

Secrets are not in the record of the job, which the dashboard shows: the package of code has them, combined with a
random key of the same length, which the record has. Neither tells anything without the other.
"""

import io
import json
import os
import secrets
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

KILL_FILE = "place/kill-{attempt}"
"""Its presence in the run directory lets a driver that was asked to stop leave without waiting for the save."""
RANK_LINE = "[ray] this is rank {rank}"
"""The first line of a worker: the job's log names workers by process and host, and a start again has others."""
KEY_VARIABLE = "JAXINFRA_SECRETS_KEY"
_SECRETS_FILE = ".jaxinfra-secrets"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the first date of a zip archive


def write_package(bundle: bytes, values: Mapping[str, str], path: Path) -> str:
    """Writes the code, and secrets, as an archive that Ray takes; returns the key of the secrets, "" without any.

    The same code gives the same bytes, which Ray then has already.
    """
    plain = json.dumps(values).encode()
    key = secrets.token_bytes(len(plain)) if values else b""
    with (
        tarfile.open(fileobj=io.BytesIO(bundle)) as archive,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as package,
    ):
        for member in archive:
            if (content := archive.extractfile(member)) is not None:
                entry = zipfile.ZipInfo(member.name, _EPOCH)
                entry.external_attr = member.mode << 16
                package.writestr(entry, content.read(), zipfile.ZIP_DEFLATED)
        if key:
            package.writestr(zipfile.ZipInfo(_SECRETS_FILE, _EPOCH), _combined(plain, key))
    return key.hex()


def take_secrets(top: Path) -> None:
    """Sets the secrets of the package that lies unpacked at `top` in the environment of this process."""
    if key := bytes.fromhex(os.environ.pop(KEY_VARIABLE, "")):
        os.environ |= json.loads(_combined((top / _SECRETS_FILE).read_bytes(), key))


def _combined(text: bytes, key: bytes) -> bytes:
    return bytes(left ^ right for left, right in zip(text, key, strict=True))
