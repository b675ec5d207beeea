"""Files of a folder arrive in a bucket, and come back."""

from pathlib import Path

import pytest

from jaxinfra.errors import ConfigError, StorageError
from jaxinfra.storage import mirror as mirror_module
from jaxinfra.storage.mirror import Mirror, fetch
from jaxinfra.storage.objects import ObjectStore
from tests.servers.fixtures import Server


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror_module, "_PART_BYTES", 100)


def lines(count: int, start: int = 0) -> str:
    return "".join(f'{{"step": {step}}}\n' for step in range(start, start + count))


def fetched(store: ObjectStore, folder: Path, name: str) -> str:
    fetch(store, [name], folder)
    return (folder / name).read_text()


def test_a_growing_file_is_stored_in_parts(server: Server, tmp_path: Path, small_parts: None) -> None:
    store, folder = ObjectStore(server.new_url()), tmp_path / "run"
    folder.mkdir()
    (folder / "summary.json").write_text("{}")
    (folder / ".hidden").write_text("none")
    file = folder / "metrics.jsonl"
    with Mirror(folder, store) as mirror:
        written = ""
        for start in range(0, 60, 10):
            written += lines(10, start)
            with file.open("a") as out:
                out.write(lines(10, start))
            before = server.faults.requests
            mirror.sync()
            assert fetched(store, tmp_path / "back", "metrics.jsonl") == written
            assert server.faults.requests > before
        parts = [name for name in store.list_names() if name.startswith("metrics")]
        assert len(parts) > 5
        assert all(store.read(name).endswith(b"}\n") for name in parts), "parts are whole lines"
        first = server.faults.requests
        mirror.sync()
        assert server.faults.requests == first, "nothing has changed"
        file.write_text(lines(2))  # as after a resume, which drops rows: shorter
    assert fetched(store, tmp_path / "back", "metrics.jsonl") == lines(2)
    assert store.list_names() == ["metrics.jsonl", "summary.json"]


def test_replaced_and_deleted_files(server: Server, tmp_path: Path) -> None:
    store = ObjectStore(server.new_url())
    with Mirror(tmp_path, store) as mirror:
        for text in "first", "second":
            (tmp_path / "a.txt").write_text(text)
            mirror.sync()
            assert store.read("a.txt") == text.encode()
        (tmp_path / "a.txt").unlink()
    assert store.list_names() == []


def test_a_bucket_that_is_away_gets_them_later(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXINFRA_STORAGE_RETRY_S", "0.5")
    store = ObjectStore(server.new_url())
    (tmp_path / "metrics.jsonl").write_text(lines(3))
    mirror = Mirror(tmp_path, store)
    server.faults.down = True
    with pytest.raises(StorageError):
        mirror.sync()
    server.faults.down = False
    mirror.close()
    assert store.read("metrics.jsonl").decode() == lines(3)


def test_nothing_is_copied_once_the_lease_is_lost(server: Server, tmp_path: Path) -> None:
    def check() -> None:
        raise ConfigError("lost")

    store = ObjectStore(server.new_url())
    (tmp_path / "summary.json").write_text("{}")
    mirror = Mirror(tmp_path, store, check)
    with pytest.raises(ConfigError):
        mirror.close()
    assert store.list_names() == []
