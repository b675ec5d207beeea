"""The files of a run directory: in a bucket, or on a disk that the hosts share and ssh reaches as HOST:PATH."""

import os
import re
from dataclasses import dataclass

from jaxinfra.launchers.places.place import Host
from jaxinfra.launchers.places.ssh import Ssh
from jaxinfra.storage.location import is_remote
from jaxinfra.storage.objects import ObjectStore

_ON_HOST = re.compile(r"(?P<host>(?:[\w.][\w.-]*@)?[\w.][\w.-]*):(?P<path>/.*)")


@dataclass(frozen=True, kw_only=True)
class HostFiles:
    """Files of a directory on the disk of a host."""

    ssh: Ssh
    host: Host
    path: str

    def read_or_none(self, name: str) -> bytes | None:
        """Returns the content; None if there is none."""
        return self.ssh.call(self.host, "read", f"{self.path}/{name}", missing_ok=True)

    def create(self, name: str, content: bytes) -> bool:
        """Writes a new file; False if there is one with other content."""
        path = f"{self.path}/{name}"
        if self.ssh.call(self.host, "create", path, stdin=content, missing_ok=True) is not None:
            return True
        return self.read_or_none(name) == content


type RunFiles = HostFiles | ObjectStore
"""Small files of a run directory."""


def split_location(location: str) -> tuple[str, str] | None:
    """Returns host and path of HOST:PATH; None for a URL or a path of this machine."""
    found = None if is_remote(location) else _ON_HOST.fullmatch(location)
    return None if found is None else (found["host"], found["path"])


def files_of(location: str, workdir: str = "") -> RunFiles:
    """Returns the files of a run directory.

    A path without a host is one of this machine.
    """
    if is_remote(location):
        return ObjectStore(location)
    host, path = split_location(location) or ("", os.path.abspath(location))
    return HostFiles(ssh=Ssh(workdir=workdir), host=Host(address=host), path=path)
