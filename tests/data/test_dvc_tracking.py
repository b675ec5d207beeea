"""A store that DVC tracks, with a real repository, cache and remote."""

import os
import shutil
import subprocess
import sys

import pytest

from jaxinfra.data.store.store import TokenStore
from jaxinfra.errors import ConfigError, DataError, StorageError
from tests.refusals import raises

pytestmark = pytest.mark.slow


def dvc(folder, *words):
    environment = os.environ | {"DVC_NO_ANALYTICS": "1"}
    command = [sys.executable, "-m", "dvc", *words]
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, timeout=600)


@pytest.fixture(scope="module")
def repository(store_path, tmp_path_factory):
    """A repository without its cache: everything is in the remote."""
    folder = tmp_path_factory.mktemp("dvc")
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    dvc(folder, "init", "-q")
    dvc(folder, "remote", "add", "-q", "-d", "there", str(folder / "remote"))
    shutil.copytree(store_path.parent, folder / "store")
    dvc(folder, "add", "-q", "store")
    dvc(folder, "push", "-q")
    shutil.rmtree(folder / "store")
    shutil.rmtree(folder / ".dvc" / "cache")
    return folder


@pytest.fixture
def clone(repository, tmp_path):
    return shutil.copytree(repository, tmp_path / "clone", ignore=shutil.ignore_patterns("remote"))


@pytest.mark.parametrize("name", ["store.dvc", "store"])
def test_a_store_is_brought_from_the_remote_and_then_from_the_cache(clone, store_path, name):
    expected = TokenStore.open(store_path).manifest
    assert TokenStore.open(clone / name).manifest == expected
    shutil.rmtree(clone / "store")
    (clone / ".dvc" / "config").write_text("")  # no remote any more
    store = TokenStore.open(clone / name)
    assert store.manifest == expected
    assert all(damage is None for _, damage in store.verify())


def test_a_store_that_was_changed_is_not_overwritten(clone):
    TokenStore.open(clone / "store.dvc")
    (index,) = (clone / "store").glob("versions.json")
    index.unlink()
    index.write_text("{}")
    with raises(DataError, "store.dvc: changed"):
        TokenStore.open(clone / "store.dvc")
    assert index.read_text() == "{}"


def test_what_is_nowhere_is_said(clone):
    (clone / ".dvc" / "config").write_text("")
    with raises(StorageError, "store.dvc: dvc pull"):
        TokenStore.open(clone / "store")


def test_a_file_without_its_repository_is_said(clone, tmp_path):
    shutil.copy(clone / "store.dvc", tmp_path / "store.dvc")
    with raises(ConfigError, "store.dvc: repository DVC"):
        TokenStore.open(tmp_path / "store")
