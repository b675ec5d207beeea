"""Files of a folder arrive in a bucket, and come back."""

import threading
from pathlib import Path

import pytest

from jaxinfra.errors import RunInUseError, StorageError
from jaxinfra.storage import lease as lease_module
from jaxinfra.storage import mirror as mirror_module
from jaxinfra.storage.lease import hold
from jaxinfra.storage.mirror import Mirror, fetch
from jaxinfra.storage.objects import ObjectStore
from tests.refusals import raises
from tests.servers.fixtures import Server


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror_module, "_PART_BYTES", 100)


def lines(count: int, start: int = 0) -> str:
    return "".join(f'{{"step": {step}}}\n' for step in range(start, start + count))


def fetched(store: ObjectStore, folder: Path, name: str) -> str:
    fetch(store.url, [name], folder)
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
        raise RunInUseError("lost")

    store = ObjectStore(server.new_url())
    (tmp_path / "summary.json").write_text("{}")
    mirror = Mirror(tmp_path, store, check)
    with pytest.raises(RunInUseError):
        mirror.close()
    assert store.list_names() == []


@pytest.mark.parametrize("is_known", [False, True])
def test_a_round_that_is_under_way_when_the_lease_is_lost_replaces_nothing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_known: bool
) -> None:
    """Its process is cut off after the round has looked at the lease, and goes on when the new owner trains."""
    monkeypatch.setattr(lease_module, "_process_identity", lambda pid: "")
    arrives, goes_on = threading.Event(), threading.Event()

    class CutOff(ObjectStore):
        def replace(self, name: str, content: bytes | None, generation: bytes) -> bytes | None:
            if content == b"old 2":
                arrives.set()
                assert goes_on.wait(600)
            return super().replace(name, content, generation)

    def write(folder: str, text: str) -> Path:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "run.json").write_text(text)
        return tmp_path / folder

    url, lost = server.new_url(), []

    def sync(mirror: Mirror) -> None:
        try:
            mirror.sync()
        except RunInUseError as error:
            lost.append(error)

    with hold(url, beat_s=1000) as old_lease:
        old = Mirror(write("old", "old 1"), CutOff(url), old_lease.check_now)
        if is_known:
            old.sync()
        write("old", "old 2")
        thread = threading.Thread(target=sync, args=(old,))
        thread.start()
        assert arrives.wait(600)
        with hold(url, beat_s=0.1, expiry_s=0.5) as lease:
            Mirror(write("new", "new"), ObjectStore(url), lease.check_now).close()
        goes_on.set()
        thread.join()
        assert ObjectStore(url).read("run.json") == b"new"
        assert [type(error) for error in lost] == [RunInUseError]
        with pytest.raises(RunInUseError):
            old.close()


def test_a_file_that_was_fetched_and_is_deleted_is_deleted_in_the_bucket(server: Server, tmp_path: Path) -> None:
    """As summary.json of the last stop when a run goes on."""
    store = ObjectStore(server.new_url())
    for name in ("summary.json", "metrics.jsonl", "metrics.jsonl.1", "checkpoints/index.json"):
        store.write(name, b"{}\n")
    fetched = fetch(store.url, ["run.json", "metrics.jsonl", "summary.json"], tmp_path)
    assert fetched == ["metrics.jsonl", "summary.json"]
    with Mirror(tmp_path, store, fetched=fetched) as mirror:
        (tmp_path / "summary.json").unlink()
        mirror.sync()
        assert "summary.json" not in store.list_names()
        (tmp_path / "metrics.jsonl").unlink()
    assert store.list_names() == ["checkpoints/index.json"]


def test_a_deletion_that_fails_leaves_no_old_lines(
    server: Server, tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, folder, replace = ObjectStore(server.new_url()), tmp_path / "run", ObjectStore.replace
    folder.mkdir()
    deletions = []

    def fail_once(self: ObjectStore, name: str, content: bytes | None, generation: bytes) -> bytes | None:
        if content is None:
            deletions.append(name)
            if len(deletions) == 2:
                raise StorageError("away")
        return replace(self, name, content, generation)

    (folder / "metrics.jsonl").write_text(lines(60))
    with Mirror(folder, store) as mirror:
        mirror.sync()
        monkeypatch.setattr(ObjectStore, "replace", fail_once)
        (folder / "metrics.jsonl").write_text(lines(3))
        with raises(StorageError, "away"):
            mirror.sync()
        with (folder / "metrics.jsonl").open("a") as out:
            out.write(lines(57, 3).replace("step", "other"))
        mirror.sync()
        expected = (folder / "metrics.jsonl").read_text()
        assert fetched(store, tmp_path / "back", "metrics.jsonl") == expected
        (folder / "metrics.jsonl").write_text(lines(3))
    assert store.list_names() == ["metrics.jsonl"]
