import subprocess

import pytest

from jaxinfra.machine.environment import git_state, package_versions


@pytest.fixture
def tree(tmp_path, monkeypatch):
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "somebody")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "somebody@example.org")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    return tmp_path


def git(directory, *arguments):
    done = subprocess.run(["git", "-C", directory, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_git_state(tree):
    assert git_state(tree) == {"commit": None, "dirty": None}
    git(tree, "init", "-q")
    assert git_state(tree) == {"commit": None, "dirty": None}
    git(tree, "commit", "-q", "--allow-empty", "-m", "start")
    commit = git(tree, "rev-parse", "HEAD")
    assert git_state(tree) == {"commit": commit, "dirty": False}
    (tree / "new").mkdir()
    (tree / "new" / "file").write_text("x")
    assert git_state(tree / "new") == {"commit": commit, "dirty": True}


def test_git_state_never_raises(tree, monkeypatch):
    assert git_state(tree / "nowhere") == {"commit": None, "dirty": None}
    assert git_state(tree, timeout_s=0.0) == {"commit": None, "dirty": None}
    monkeypatch.setenv("PATH", "")
    assert git_state(tree) == {"commit": None, "dirty": None}


def test_package_versions():
    found = package_versions(["pytest", "no-such-package-here"])
    assert found == {"pytest": pytest.__version__, "no-such-package-here": None}
