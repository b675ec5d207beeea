"""Finds the git state and package versions for the run record. A value that cannot be found is None, not an error."""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path

BUNDLE_FILE = ".jaxinfra-bundle.json"
"""At the top of code that was sent without its git directory: the git state that it was packed with."""


def git_state(directory: str | os.PathLike[str], timeout_s: float = 5.0) -> dict[str, str | bool | None]:
    """Returns `{"commit": hash, "dirty": bool}` of the git working tree that contains `directory`.

    It is dirty if tracked files differ from the commit or untracked files exist. Both are None outside a working tree,
    before the first commit and without git; `dirty` alone is None if `git status` takes too long. Code that was sent to
    this machine has the state of where it came from.
    """
    sent = next((path for folder in Path(directory).parents if (path := folder / BUNDLE_FILE).is_file()), None)
    if sent is not None:
        return json.loads(sent.read_text())
    commit = _git(directory, timeout_s, "rev-parse", "--verify", "HEAD")
    changes = None if commit is None else _git(directory, timeout_s, "status", "--porcelain")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def code_digest(package: Path) -> str:
    """Returns a hash of all Python files of a package: the first 16 hex digits of a SHA-256."""
    paths = (path for path in package.rglob("*.py") if path.is_file())  # not the dangling links of an editor's locks
    files = sorted(path.relative_to(package).as_posix() for path in paths)
    return _digest(b"".join(f"{name}\0".encode() + (package / name).read_bytes() for name in files))


def module_digests(files: Mapping[str, str | None]) -> dict[str, str]:
    """Returns a hash of each module whose file is a Python file that still exists, by "the code of MODULE"."""
    return {
        f"the code of {name}": _digest(Path(file).read_bytes())
        for name, file in files.items()
        if file and file.endswith(".py") and os.path.isfile(file)
    }


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def package_versions(names: Iterable[str]) -> dict[str, str | None]:
    """Returns the installed version of each package, None if it is not installed."""
    versions: dict[str, str | None] = dict.fromkeys(names)
    for name in versions:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def host_state() -> dict[str, str | int | None]:
    """Returns name, operating system, CPU, usable cores and memory of this machine, and the version of Python."""
    return {
        "name": platform.node(),
        "os": platform.platform(terse=True),
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
    }


def usable_cores() -> int | None:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def cpu_model() -> str:
    """Returns the name of the CPU, or that of its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _git(directory: str | os.PathLike[str], timeout_s: float, *arguments: str) -> str | None:
    """Returns the output of a git command, or None if it fails."""
    try:
        process = subprocess.run(
            ["git", "-C", os.fspath(directory), *arguments],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=True,
            # Without this, `git status` takes the index lock and can make a commit elsewhere fail.
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return process.stdout.strip()
