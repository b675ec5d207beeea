"""Locks the packages of a run for its hosts, and finds a uv that runs on them."""

import http.client
import os
import platform
import subprocess
import sys
import tarfile
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib import metadata
from io import BytesIO
from pathlib import Path

from jaxinfra.errors import ConfigError, StorageError
from jaxinfra.launchers.places.bundle import short_hash
from jaxinfra.packages import import_optional
from jaxinfra.storage.atomic import write_bytes_atomic

_CACHE = Path.home() / ".cache" / "jaxinfra" / "places"
_RELEASES = "https://github.com/astral-sh/uv/releases/download"
_NOT_LOCKED = {"jaxinfra", "pip", "uv", "setuptools", "wheel"}


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The Python and the packages of a run on its hosts."""

    hash: str
    python: str  # such as 3.13
    requirements: str  # a line for each package, with its version


def lock(extras: Sequence[str], arch: str, uv_variables: Mapping[str, str]) -> Environment:
    """Resolves jaxinfra's packages with these extras for Linux on an architecture, as `uname -m` says it.

    What is installed here keeps its version. The result is kept, by a hash of what goes into it: hosts that join later
    get the same packages. Raises ConfigError with what uv says if there is no solution.
    """
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    wanted = sorted(requirements_of(extras))
    installed = {each.name.lower().replace("_", "-"): each.version for each in metadata.distributions()}
    pinned = sorted(f"{name}=={version}" for name, version in installed.items() if name not in _NOT_LOCKED)
    command = [uv_program(), "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--python-version", python]
    command += ["--python-platform", f"{arch}-manylinux_2_35", "-"]
    key = short_hash("\n".join([*command[1:], *wanted, *pinned, *sorted(uv_variables.values())]).encode())
    kept = _CACHE / "locks" / f"{key}.txt"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        constraints = kept.with_suffix(f".{os.getpid()}.in")
        constraints.write_text("\n".join(pinned))
        try:
            done = subprocess.run(
                [*command, "--constraints", str(constraints)],
                input="\n".join(wanted),
                capture_output=True,
                text=True,
                check=False,
                env={**os.environ, **uv_variables},
            )
        finally:
            constraints.unlink()
        if done.returncode:
            reason = " ".join(done.stderr.split())
            raise ConfigError(f"--extra {' '.join(extras)}: the packages have no solution for {arch}: {reason}")
        write_bytes_atomic(kept, done.stdout.encode())
    text = kept.read_text()
    return Environment(hash=short_hash(f"{python} {arch}\n{text}".encode()), python=python, requirements=text)


def requirements_of(extras: Sequence[str]) -> set[str]:
    """Returns the requirements of jaxinfra and of some of its extras, with their markers but for the extra's."""
    packaging = import_optional("packaging.requirements", needed_by="--place", install="jaxinfra[places]")
    declared = [packaging.Requirement(text) for text in metadata.requires("jaxinfra") or ()]
    provided = metadata.metadata("jaxinfra").get_all("Provides-Extra") or []
    for extra in extras:
        if extra not in provided:
            raise ConfigError(f"--extra {extra}: jaxinfra has no such extra; use one of {', '.join(sorted(provided))}")
    found: set[str] = set()
    for each in declared:
        marker = str(each.marker or "")
        of_extra = next((extra for extra in provided if f'extra == "{extra}"' in marker), None)
        if (of_extra is None or of_extra in extras) and each.name != "editables":  # of an editable install
            if each.name == "jaxinfra":  # an extra of extras
                found |= requirements_of(sorted(each.extras))
                continue
            version = f"{each.name}{'[' + ','.join(sorted(each.extras)) + ']' if each.extras else ''}{each.specifier}"
            others = [part for part in marker.split(" and ") if part and "extra ==" not in part]
            found.add(" ; ".join([version, *([" and ".join(others)] if others else [])]))
    return found


def uv_program() -> str:
    """Returns the uv of this machine; ConfigError if the extra that has it is not installed."""
    return os.fspath(import_optional("uv", needed_by="--place", install="jaxinfra[places]").find_uv_bin())


def uv_version() -> str:
    """Returns the version of uv on this machine, and so on the hosts."""
    uv_program()
    return metadata.version("uv")


def uv_for(arch: str) -> Path:
    """Returns a uv for Linux on an architecture: this machine's own, or that of uv's release, whose hash is checked.

    Raises StorageError if that cannot be read.
    """
    if sys.platform == "linux" and platform.machine() == arch:
        return Path(uv_program())
    name, version = f"uv-{arch}-unknown-linux-musl", uv_version()
    kept = _CACHE / f"{name}-{version}"
    if not kept.exists():
        url = f"{os.environ.get('JAXINFRA_UV_RELEASES', _RELEASES)}/{version}/{name}.tar.gz"
        content, hashed = _fetch(url), _fetch(f"{url}.sha256").split()[0].decode()
        if sha256(content).hexdigest() != hashed:
            raise StorageError(f"{url}: its hash is not {hashed}; try again")
        with tarfile.open(fileobj=BytesIO(content)) as archive:
            member = archive.extractfile(f"{name}/uv")
            assert member is not None, url
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_bytes_atomic(kept, member.read())
    return kept


def _fetch(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=120) as answer:
            return answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise StorageError(f"{url}: cannot be read: {error}; it has the uv that installs Python on the hosts") from None
