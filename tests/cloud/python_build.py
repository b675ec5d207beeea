"""A Python for hosts without one: that of these tests, packed as python-build-standalone packs its "install_only"."""

import hashlib
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path

from tests.cloud.root import CACHE, locked

_FORM = 1  # of the archive: another number makes a new one
_LEFT_OUT = {
    "EXTERNALLY-MANAGED", "__pycache__", "dist-packages", "idlelib", "site-packages", "sitecustomize.py", "test",
    "turtledemo",
}  # fmt: skip
_OF_EVERY_LINUX = re.compile(r"(ld-linux|linux-vdso|lib(c|m|dl|rt|pthread|util|resolv)\.so)")


def python_archive() -> Path:
    """Returns the archive, a .tar.gz with `python/bin/python3`; makes it if it is not there, in some seconds."""
    program = Path(sys.executable).resolve()
    state = program.stat()
    key = hashlib.sha256(f"{_FORM} {program} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()[:8]
    archive = CACHE / f"python-{platform.python_version()}-{key}.tar.gz"
    with locked(archive.name):
        if not archive.exists():
            with tempfile.TemporaryDirectory(dir=CACHE) as folder:
                _copy(program, Path(folder, "python"))
                unfinished = Path(folder, archive.name)
                with tarfile.open(unfinished, "w:gz", compresslevel=1) as packed:
                    packed.add(Path(folder, "python"), "python")
                unfinished.rename(archive)
    return archive


def _copy(program: Path, python: Path) -> None:
    version = f"python{sysconfig.get_python_version()}"
    libraries, packages = python / "lib", python / "lib" / version
    shutil.copytree(sysconfig.get_path("stdlib"), packages, ignore=_left_out, ignore_dangling_symlinks=True)
    (packages / "site-packages").mkdir()
    (python / "bin").mkdir()
    shutil.copy(program, python / "bin" / version)
    for name in ("python3", "python"):
        (python / "bin" / name).symlink_to(version)
    binaries = {python / "bin" / version: "$ORIGIN/../lib"}
    binaries |= {path: "$ORIGIN/../.." for path in (packages / "lib-dynload").glob("*.so")}
    found: dict[str, Path] = {}
    for path, folder in binaries.items():
        if needed := _needed(path):
            found |= needed
            _set_path(path, folder)
    for name, path in found.items():
        shutil.copy(path.resolve(), libraries / name)
        _set_path(libraries / name, "$ORIGIN")


def _left_out(folder: str, names: list[str]) -> set[str]:
    del folder
    return {name for name in names if name in _LEFT_OUT or name.startswith("config-")}


def _needed(program: Path) -> dict[str, Path]:
    """Returns the shared libraries, with those that they need, that a host may lack."""
    done = subprocess.run(["ldd", program], capture_output=True, text=True)  # fails for a static one
    lines = (line.split() for line in done.stdout.splitlines() if "=> /" in line)
    return {words[0]: Path(words[2]) for words in lines if not _OF_EVERY_LINUX.match(words[0])}


def _set_path(program: Path, folder: str) -> None:
    subprocess.run(["patchelf", "--set-rpath", folder, program], check=True)
