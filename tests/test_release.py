"""`make release` on a copy of the clone."""

import shutil
import signal
import subprocess
import sys
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import pytest

import jaxinfra

CLONE = Path(__file__).parents[1]
FILES = ("pyproject.toml", "README.md", "LICENSE", "Makefile", ".gitignore", "docs/changelog.md", "tests/release.py")
INTERRUPTED = """
import os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[-1])
folder.mkdir(exist_ok=True)
(folder / "half").touch()
os.kill(os.getppid(), signal.SIGINT)
time.sleep(60)
"""
CURRENT = f'__version__ = "{jaxinfra.__version__}"'


def git(tree: Path, *words: str) -> str:
    """Runs git as somebody who has told it no name."""
    who = ("-c", "user.name=A", "-c", "user.email=a@b.c")
    return subprocess.run(["git", *who, *words], cwd=tree, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository with what a release needs, in which 1.2.3 is being worked on."""
    tree = tmp_path / "clone"
    for name in FILES:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(CLONE / name, tree / name)
    (tree / "jaxinfra").mkdir()
    text = (CLONE / "jaxinfra/__init__.py").read_text()
    assert text.count(CURRENT) == 1
    (tree / "jaxinfra/__init__.py").write_text(text.replace(CURRENT, '__version__ = "1.2.3.dev0"'))
    (tree / "docs/changelog.md").write_text(
        "# Changelog\n\n## 1.2.3, not yet released\n\n- New.\n\n## 1.2.2\n\n- Old.\n"
    )
    git(tree, "init", "--quiet")
    commit(tree)
    return tree


def commit(tree: Path) -> None:
    git(tree, "add", "--all")
    git(tree, "commit", "--quiet", "--message", "Work")


def release(tree: Path, version: str) -> subprocess.CompletedProcess[str]:
    """Runs what the recipe of `make release` runs."""
    words = [sys.executable, "tests/release.py", version]
    return subprocess.run(words, cwd=tree, capture_output=True, text=True, check=False)


def state(tree: Path) -> tuple[str, list[Path]]:
    """What differs from the last commit, and what was built."""
    return git(tree, "status", "--porcelain"), sorted(tree.glob("dist/*"))


def refused(tree: Path, version: str, *named: str) -> None:
    before = state(tree)
    ended = release(tree, version)
    assert ended.returncode == 1 and ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1, ended
    assert not [word for word in named if word not in ended.stderr], ended.stderr
    assert state(tree) == before


def test_a_release_is_dated_and_built(tree: Path) -> None:
    make = [
        "make",
        "--no-print-directory",
        "release",
        "VERSION=1.2.3",
        f"VENV={sys.prefix}",
        "-o",
        f"{sys.prefix}/.installed-test",
    ]
    made = subprocess.run(make, cwd=tree, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    wheel = tree / "dist/jaxinfra-1.2.3-py3-none-any.whl"
    assert b'__version__ = "1.2.3"' in zipfile.ZipFile(wheel).read("jaxinfra/__init__.py")
    assert (tree / "dist/jaxinfra-1.2.3.tar.gz").exists()
    heading = f"# Changelog\n\n## 1.2.3, {datetime.now(UTC).date()}\n\n- New.\n\n## 1.2.2\n"
    assert (tree / "docs/changelog.md").read_text().startswith(heading)
    assert {line[3:] for line in git(tree, "status", "--porcelain").splitlines()} == {
        "docs/changelog.md",
        "jaxinfra/__init__.py",
    }
    commit_line, tag, following = (
        line.split("#")[0].split() for line in made.stdout.rpartition("next:\n")[2].splitlines()
    )
    assert commit_line[:3] == ["git", "commit", "--all"] and tag[:4] == ["git", "tag", "--annotate", "v1.2.3"]
    commit(tree)
    assert following[:2] == ["make", "release"]
    assert release(tree, following[2].partition("=")[2]).returncode == 0
    assert "# Changelog\n\n## 1.3.0, not yet released\n\n## 1.2.3, " in (tree / "docs/changelog.md").read_text()
    assert '__version__ = "1.3.0.dev0"' in (tree / "jaxinfra/__init__.py").read_text()
    commit(tree)
    refused(tree, "1.3.0", "changelog.md", "1.3.0")  # nothing has changed


def test_what_is_no_release_is_refused(tree: Path) -> None:
    refused(tree, "", "VERSION=")
    refused(tree, "next", "VERSION=next", "1.2.3")
    refused(tree, "1.2.2", "VERSION=1.2.2", "1.2.3.dev0")
    refused(tree, "1.3.0", "changelog.md", "1.2.3", "1.3.0")
    refused(tree, "1.3.0.dev0", "changelog.md", "VERSION=1.2.3")
    git(tree, "tag", "v1.2.3")
    refused(tree, "1.2.3", "v1.2.3", "tag")
    (tree / "notes.txt").touch()
    refused(tree, "1.2.3", "notes.txt")


def test_make_refuses_before_it_installs(tree: Path, tmp_path: Path) -> None:
    (tree / "notes.txt").touch()
    python, called = tmp_path / "bin/python", tmp_path / "called"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\necho "$@" >> {called}\n[ "$1" = tests/release.py ] && exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    for version, named in (("1.2.3", "notes.txt"), ("", "VERSION=")):
        make = ["make", "release", f"VERSION={version}", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}"]
        ended = subprocess.run(make, cwd=tree, capture_output=True, text=True, check=False)
        assert ended.returncode == 2 and named in ended.stderr, ended
    assert called.read_text().splitlines() == ["tests/release.py 1.2.3 --check", "tests/release.py  --check"]
    assert not (tmp_path / "venv").exists()


def test_a_build_that_fails_takes_the_version_back(tree: Path) -> None:
    (tree / "README.md").unlink()
    commit(tree)
    ended = release(tree, "1.2.3")
    assert ended.returncode == 1 and "README.md" in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("error: ") and state(tree) == ("", [])


def test_ctrl_c_while_it_builds_takes_the_version_back(tree: Path) -> None:
    (tree / "hatchling.py").write_text(INTERRUPTED)
    commit(tree)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts with & ignores it
    try:
        ended = release(tree, "1.2.3")
    finally:
        signal.signal(signal.SIGINT, handler)
    assert ended.returncode == -signal.SIGINT and state(tree) == ("", [])
