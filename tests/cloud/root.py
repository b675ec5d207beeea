"""A Debian without Python, from which hosts are booted: made by debootstrap once for a machine, and kept."""

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CACHE = Path("/var/cache/jaxinfra-tests")
"""For what takes long to make, and is the same for all tests of this machine."""

_PACKAGES = ("bash", "ca-certificates", "iproute2", "openssh-server", "procps")
_APT = Path("/etc/apt")


def debian_root() -> Path:
    """Returns the folder, which must not be written to; makes it if it is not there, in a minute."""
    suite = _suite()
    key = hashlib.sha256(" ".join(_PACKAGES).encode()).hexdigest()[:8]
    root = CACHE / f"root-{suite}-{key}"
    with locked(root.name):
        if not root.exists():
            _make(root, suite)
    return root


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Keeps other processes from making the same thing in the cache."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f".{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make(root: Path, suite: str) -> None:
    if os.geteuid() != 0:
        raise RuntimeError("hosts of tests: expected root, who may make namespaces; run these tests as root")
    debootstrap = shutil.which("debootstrap", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if debootstrap is None:
        raise RuntimeError("debootstrap: expected on PATH; apt-get install debootstrap")
    unfinished = root.with_name(f"{root.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of one who was killed
    command = [debootstrap, "--variant=minbase", f"--include={','.join(_PACKAGES)}", suite, unfinished, _mirror(suite)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"debootstrap {suite}: exit code {done.returncode}:\n{done.stdout[-2000:]}")
    shutil.rmtree(unfinished / "var/cache/apt", ignore_errors=True)
    shutil.rmtree(unfinished / "var/lib/apt/lists", ignore_errors=True)
    for key in (unfinished / "etc/ssh").glob("ssh_host_*"):
        key.unlink()  # each host makes its own
    unfinished.rename(root)


def _suite() -> str:
    lines = Path("/etc/os-release").read_text().splitlines()
    release = dict(line.split("=", 1) for line in lines if "=" in line)
    if release["ID"].strip('"') != "debian":
        raise RuntimeError(
            f"hosts of tests: expected Debian, got {release['ID']}; run these tests in a container of it"
        )
    return release["VERSION_CODENAME"].strip('"')


def _mirror(suite: str) -> str:
    """Returns the mirror from which this machine takes its own packages."""
    for path in sorted((_APT / "sources.list.d").glob("*.sources")):
        for stanza in path.read_text().split("\n\n"):
            fields = dict(
                (key.strip().lower(), value.split())
                for key, _, value in (line.partition(":") for line in stanza.splitlines() if not line.startswith("#"))
            )
            if suite in fields.get("suites", ()) and "main" in fields.get("components", ()):
                return fields["uris"][0]
    for path in (_APT / "sources.list", *sorted((_APT / "sources.list.d").glob("*.list"))):
        for line in path.read_text().splitlines() if path.exists() else ():
            words = [word for word in line.partition("#")[0].split() if not word.startswith("[") and "]" not in word]
            if words[:1] == ["deb"] and words[2:3] == [suite] and "main" in words[3:]:
                return words[1]
    raise RuntimeError(f"{_APT}/sources.list: expected a mirror of {suite}; add one")
