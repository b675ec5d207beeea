"""Packs the code that a run needs: the files of the git checkout, and jaxinfra itself where that is elsewhere."""

import gzip
import hashlib
import io
import json
import os
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jaxinfra
from jaxinfra.errors import ConfigError
from jaxinfra.machine.environment import BUNDLE_FILE

MAX_BYTES = 200 * 2**20
_SHOWN_CHANGES = 10
_LISTS = (("--cached", "--recurse-submodules"), ("--others", "--exclude-standard"))  # of git ls-files


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A tar archive with code; the same files give the same bytes."""

    hash: str
    content: bytes
    commit: str | None  # None before the first one
    changes: Sequence[str]  # lines of `git status --short`
    top: Path  # of the checkout
    folder: str  # below it, where the user is
    names: frozenset[str]  # of the files, below it

    @property
    def text(self) -> str:
        """The code in one line: commit, number of uncommitted changes, hash."""
        changes = f" with {len(self.changes)} uncommitted changes" if self.changes else ""
        return f"{(self.commit or 'no commit')[:10]}{changes}, {len(self.content) / 2**20:.1f} MiB, {self.hash}"

    @property
    def shown_changes(self) -> list[str]:
        """The uncommitted changes, without those that would scroll the rest away."""
        more = len(self.changes) - _SHOWN_CHANGES
        return [*self.changes[:_SHOWN_CHANGES], *([f"... and {more} more"] if more > 0 else [])]


def make_bundle(directory: Path, *, committed: bool = False) -> Bundle:
    """Packs the files that git tracks, or does not ignore, in the checkout of a directory.

    Raises ConfigError outside of a checkout, for too many bytes, and with `committed` for uncommitted changes.
    """
    found = _git(directory, "rev-parse", "--show-toplevel")
    if found is None:
        raise ConfigError(f"{directory}: not in a git checkout, whose files would be sent; run git init && git add -A")
    top = Path(found)
    commit = _git(top, "rev-parse", "--verify", "HEAD")
    changes = (_git(top, "status", "--short", "--untracked-files=all") or "").splitlines()
    if committed and changes:
        raise ConfigError(f"--committed: {len(changes)} files differ from the commit, first {changes[0]}; commit them")
    listed = (_git(top, "ls-files", "-z", *which) or "" for which in _LISTS)
    names = [name for text in listed for name in text.split("\0")]
    files = {name: top / name for name in sorted({*names}) if name and (top / name).is_file()}
    package = Path(jaxinfra.__file__).parent
    if not package.is_relative_to(top):
        files |= {
            f"jaxinfra/{path.relative_to(package).as_posix()}": path
            for path in sorted(package.rglob("*"))
            if path.is_file() and "__pycache__" not in path.parts
        }
    sizes = {name: path.stat().st_size for name, path in files.items()}
    if (total := sum(sizes.values())) > MAX_BYTES:
        largest = max(sizes, key=sizes.__getitem__)
        fix = f"let .gitignore name {largest} ({sizes[largest] / 2**20:.0f} MiB), and keep data in a bucket"
        raise ConfigError(f"{top}: {total / 2**20:.0f} MiB of code, more than {MAX_BYTES // 2**20}; {fix}")
    described = json.dumps({"commit": commit, "dirty": bool(changes)})
    contents = {name: (path.read_bytes(), os.access(path, os.X_OK)) for name, path in files.items()}
    content = _archive({**contents, BUNDLE_FILE: (described.encode(), False)})
    prefix = (_git(directory, "rev-parse", "--show-prefix") or "").rstrip("/") or "."
    if prefix != "." and not any(name.startswith(f"{prefix}/") for name in files):
        raise ConfigError(f"{directory}: git ignores all that is here, so it is not sent; start in {top}")
    return Bundle(
        hash=short_hash(content),
        content=content,
        commit=commit,
        changes=changes,
        top=top,
        folder=prefix,
        names=frozenset(files),
    )


def short_hash(content: bytes) -> str:
    """Returns what names content: 16 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(content).hexdigest()[:16]


def _archive(files: Mapping[str, tuple[bytes, bool]]) -> bytes:
    packed = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=packed, mode="wb", mtime=0, compresslevel=6) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name, (content, is_program) in sorted(files.items()):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o755 if is_program else 0o644
            archive.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


def _git(directory: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(directory), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ConfigError("git: not installed, which finds the code to send; install it") from None
    return done.stdout.rstrip("\n") if done.returncode == 0 else None
