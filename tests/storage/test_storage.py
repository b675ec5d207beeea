"""Folders, S3 and Google Cloud Storage through one class: the same bytes, and one line when something is wrong."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from jaxinfra.data.store import arrays
from jaxinfra.errors import ConfigError, DataError, StorageError
from jaxinfra.storage.connection import check_url
from jaxinfra.storage.errors import REMAKE
from jaxinfra.storage.objects import Storage
from tests.servers.fixtures import Server

FILES = {"a": b"1" * 1000, "deep/er/b": bytes(range(256)) * 9000, "empty": b"", "manifest.json": b"{}"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of several sizes."""
    for name, content in FILES.items():
        path = tmp_path / "from" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "from"


@pytest.fixture
def place(server: Server, monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.setenv("JAXINFRA_STORAGE_RETRY_S", "4")
    return Storage(server.new_url())


@pytest.mark.parametrize("kind", ["folder", "s3", "gcs"])
def test_objects_are_written_read_listed_and_deleted(kind, tmp_path, request):
    if kind == "folder":
        storage = Storage(tmp_path / "store")
    else:
        server = request.getfixturevalue(kind)
        storage = Storage(server.new_url())
    assert storage.names() == []
    assert not storage.exists("x/y")
    storage.write("x/y", b"one")
    storage.write("x/y", b"two")
    storage.child("x").write("z", b"")
    assert storage.exists("x/y")
    assert (storage.read("x/y"), storage.read("x/z")) == (b"two", b"")
    assert storage.names() == ["x/y", "x/z"]
    assert storage.child("x").names() == ["y", "z"]
    storage.check({"x/y": 3, "x/z": 0})
    storage.delete("x/y")
    storage.delete("x/y")
    assert storage.names() == ["x/z"]
    with pytest.raises(DataError, match=f"^{storage.url}/x/y: "):
        storage.read("x/y")
    storage.write("x/y", b"four")
    for sizes, message in [
        ({"x/y": 4, "gone": 1}, "gone: missing"),
        ({"x/y": 3}, "x/y: 4 bytes, not 3"),
        ({"x/y": 9}, "x/y: fewer than 9 bytes|x/y: 4 bytes, not 9"),
    ]:
        with pytest.raises(DataError, match=message):
            storage.check(sizes)


@pytest.mark.parametrize("kind", ["folder", "s3", "gcs"])
def test_no_update_of_several_at_once_is_lost(kind, tmp_path, request):
    url = tmp_path if kind == "folder" else request.getfixturevalue(kind).new_url()

    def add(number: int) -> None:
        for part in range(3):
            own = f"{number}.{part} ".encode()
            Storage(url).update("list", lambda old, own=own: (old or b"") + own)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(4)))
    expected = [f"{number}.{part}" for number in range(4) for part in range(3)]
    assert sorted(Storage(url).read("list").decode().split()) == expected


def test_an_upload_writes_the_named_last(server, place, folder):
    sent = []
    server.faults.after = lambda request: sent.append(request) if request.startswith(("PUT", "POST")) else None
    place.upload(folder, last=["a", "manifest.json"])
    assert {name: place.read(name) for name in place.names()} == FILES
    assert ["/a" in sent[-2] or "2Fa" in sent[-2], "manifest.json" in sent[-1]] == [True, True], sent


def _array(path: str) -> np.ndarray:
    tokens = np.random.default_rng(0).integers(0, 60_000, 3 * arrays.CHUNK + 17).astype(np.uint16)
    arrays.append(arrays.create(path, tokens.dtype, 2**16 - 1), path, tokens)
    return tokens


def _read_array(path: str, length: int) -> np.ndarray:
    return arrays.read_windows(arrays.open_array(path, arrays.cache_context()), path, [0], length)[0]


def test_arrays_are_the_same_bytes_in_a_folder_and_remote(place, tmp_path):
    tokens = _array(place.where("tokens"))
    _array(str(tmp_path / "tokens"))
    local = Storage(tmp_path / "tokens")
    assert {name: local.read(name) for name in local.names()} == {
        name: place.child("tokens").read(name) for name in place.child("tokens").names()
    }
    np.testing.assert_array_equal(_read_array(place.where("tokens"), len(tokens)), tokens)


@pytest.mark.parametrize("fault", ["unavailable", "reset", "delay_s"])
def test_faults_on_the_way_change_nothing(fault, server, place, folder):
    setattr(server.faults, fault, 0.2 if fault == "delay_s" else 0.3)
    tokens = _array(place.where("tokens"))
    np.testing.assert_array_equal(_read_array(place.where("tokens"), len(tokens)), tokens)
    if fault != "delay_s":
        place.upload(folder, last=["manifest.json"])
        assert {name: place.read(name) for name in FILES} == FILES
    assert server.faults.requests > 3
    assert fault == "delay_s" or server.faults.fired > 0


def test_a_server_that_is_down_for_a_while_is_waited_for(server, place):
    place.write("x", b"x")
    server.faults.down_for(1)
    assert place.read("x") == b"x"
    assert server.faults.fired > 0


def test_a_server_that_is_down_beyond_the_budget_is_one_line_and_nothing_looks_whole(server, folder):
    place = Storage(server.new_url(), retry_s=0.2)
    server.faults.down = True
    for call in [
        lambda: place.upload(folder, last=["manifest.json"]),
        lambda: place.read("a"),
        lambda: place.exists("a"),
        lambda: place.check(dict.fromkeys(FILES, 3)),
    ]:
        with pytest.raises(StorageError, match=rf"^{place.url}/\S+: .*ABORTED.*retry"):
            call()
    server.faults.clear()
    assert place.names() == []


def test_a_manifest_is_not_written_while_files_are_missing(server, folder):
    place = Storage(server.new_url(), retry_s=0.05)
    outcomes = []
    for share in (0.9, 0.7, 0.5, 0):
        server.faults.unavailable = share
        try:
            place.upload(folder, last=["manifest.json"])
            outcomes.append("whole")
        except StorageError:
            outcomes.append("failed")
        server.faults.clear()
        assert not place.exists("manifest.json") or set(place.names()) == set(FILES)
    assert outcomes[0] == "failed"
    assert outcomes[-1] == "whole"


def test_an_upload_that_failed_goes_on_with_what_is_missing(server, folder):
    sent = []
    server.faults.after = lambda request: sent.append(request) if request.startswith(("PUT", "POST")) else None
    place = Storage(server.new_url())
    place.upload(folder, last=["manifest.json"])
    assert len(sent) == len(FILES)
    for change, missing in [
        (lambda: place.delete("a"), {"a"}),
        (lambda: place.write("deep/er/b", FILES["deep/er/b"][:-1] + b"?"), {"deep/er/b"}),
        (lambda: place.write("deep/er/b", b"short"), {"deep/er/b"}),
        (lambda: place.write("empty", b"not"), {"empty"}),
        (lambda: None, set()),
    ]:
        change()
        sent.clear()
        place.upload(folder, last=["manifest.json"], resume=True)
        assert len(sent) == len(missing | {"manifest.json"})
        assert {name: place.read(name) for name in place.names()} == FILES


@pytest.mark.parametrize("kept", [0, 2000], ids=["lost", "cut"])
def test_what_the_storage_loses_is_noticed_before_the_last_files_are_written(kept, server, place, folder):
    def lose(request: str) -> None:
        if request.startswith(("PUT", "POST")) and request.endswith("b"):
            server.put(place.where("deep/er/b"), FILES["deep/er/b"][:kept])

    server.faults.after = lose
    with pytest.raises(StorageError, match=f"^{place.url}/deep/er/b: "):
        place.upload(folder, last=["manifest.json"])
    assert not place.exists("manifest.json")


@pytest.mark.parametrize("damage", [slice(0, -5), slice(0, 0), slice(0, 100)])
def test_a_truncated_array_is_an_error_of_the_data(damage, server, place):
    tokens = _array(place.where("tokens"))
    shard = place.where("tokens/c/0")
    server.put(shard, server.get(shard)[damage])
    with pytest.raises(DataError, match=rf"^{place.url}/tokens: .*; {REMAKE}$"):
        _read_array(place.where("tokens"), len(tokens))


@pytest.mark.parametrize("call", ["read", "exists", "names"])
def test_a_missing_bucket_of_s3_is_said(call, s3):
    place = Storage("s3://no-such-bucket/store")
    with pytest.raises(StorageError, match="^s3://no-such-bucket/store.*; make the bucket"):
        getattr(place, call)(*([] if call == "names" else ["a"]))


def test_nothing_is_written_to_a_missing_bucket(server):
    place = Storage(f"{server.scheme}://no-such-bucket/store")
    with pytest.raises(StorageError, match=f"^{server.scheme}://no-such-bucket/store/a: "):
        place.write("a", b"a")


_WRONG = """
import sys
from jaxinfra.data.store import arrays
from jaxinfra.storage.objects import Storage
from jaxinfra.errors import JaxinfraError
place = Storage(sys.argv[1], retry_s=1)
for call in [
    lambda: place.read("a"),
    lambda: place.exists("a"),
    lambda: place.write("a", b"a"),
    lambda: place.delete("a"),
    lambda: place.check({"a": 1}),
    lambda: arrays.open_array(place.where("tokens"), arrays.cache_context()),
]:
    try:
        print("done", call())
    except JaxinfraError as error:
        print(error.exit_code, error)
"""


@pytest.mark.parametrize(
    "wrong", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "GOOGLE_AUTH_TOKEN_FOR_TESTING"]
)
def test_wrong_credentials_are_one_line_and_are_not_shown(wrong, request, monkeypatch):
    server = request.getfixturevalue("gcs" if wrong.startswith("GOOGLE") else "s3")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "a-session-token-that-is-never-shown")
    monkeypatch.setenv(wrong, "NEVER-shown-this-one")
    url = server.new_url()
    run = subprocess.run([sys.executable, "-c", _WRONG, url], capture_output=True, text=True, check=True, timeout=60)
    lines = run.stdout.splitlines()
    assert len(lines) == 6, run
    assert all(line.startswith(f"82 {url}/") and "credentials that are allowed" in line for line in lines), lines
    if wrong != "AWS_ACCESS_KEY_ID":
        assert "NEVER-shown" not in run.stdout + run.stderr
    assert "never-shown" not in run.stdout + run.stderr


@pytest.mark.parametrize("profile", ["default", "other"])
def test_credentials_of_a_profile_are_found(profile, s3, tmp_path, monkeypatch):
    own = {name: s3.environment[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    (tmp_path / "credentials").write_text(f"[{profile}]\n" + "".join(f"{k.lower()} = {v}\n" for k, v in own.items()))
    (tmp_path / "config").write_text(f"[profile {profile}]\nregion = us-east-1\n")
    for name in own:
        monkeypatch.delenv(name)
    if profile != "default":
        monkeypatch.setenv("AWS_PROFILE", profile)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    code = "import sys; from jaxinfra.storage.objects import Storage; Storage(sys.argv[1]).write('a', b'a')"
    url = s3.new_url()
    run = subprocess.run([sys.executable, "-c", code, url], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert s3.get(f"{url}/a") == b"a"
    assert s3.secret not in run.stdout + run.stderr


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIA:sEcReT@bucket/store",
        "s3://sEcReT@bucket/store",
        "s3://bucket/store?X-Amz-Signature=sEcReT",
        "gs://bucket/store#sEcReT",
        "https://user:sEcReT@host/store?token=sEcReT",
    ],
)
def test_a_url_with_credentials_is_refused_without_showing_them(url):
    with pytest.raises(ConfigError, match="credentials") as caught:
        Storage(url)
    assert "sEcReT" not in str(caught.value)


def test_urls_are_understood_or_refused(monkeypatch):
    assert check_url("gs://bucket/a/b/") == "gs://bucket/a/b"
    assert check_url("file:///a/b") == "/a/b"
    assert check_url("~/b") == str(Path.home() / "b")
    for url in ("http://host/store", "s3:///store", "abc://x/y"):
        with pytest.raises(ConfigError, match=f"^{url}: .*s3://BUCKET/PREFIX"):
            check_url(url)
    with pytest.raises(ConfigError, match="^s3://B/x: "):
        Storage("s3://B/x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:sEcReT@host")
    with pytest.raises(ConfigError, match="^AWS_ENDPOINT_URL: ") as caught:
        Storage("s3://bucket/x")
    assert "sEcReT" not in str(caught.value)


_SILENT = """
import os, socket
from jaxinfra.errors import StorageError
from jaxinfra.storage import connection, objects
with socket.socket() as silent:
    silent.bind(("127.0.0.1", 0))
    silent.listen(50)
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{silent.getsockname()[1]}"
    connection._PATIENCE["TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS"] = "1"
    try:
        objects.Storage("s3://bucket/x", retry_s=0.1).read("a")
    except StorageError as error:
        print(error)
"""


@pytest.mark.slow
def test_a_server_that_says_nothing_has_failed(s3_server):
    given = os.environ | dict(s3_server.environment) | {"AWS_SECRET_ACCESS_KEY": "b"}
    environment = {k: v for k, v in given.items() if k != "AWS_ENDPOINT_URL_S3" and "_CURL_" not in k}
    code = [sys.executable, "-c", _SILENT]
    run = subprocess.run(code, capture_output=True, text=True, timeout=120, env=environment)
    assert "s3://bucket/x/a: " in run.stdout and "All 6 retry attempts failed: CURL error" in run.stdout, run
    assert "1 bytes/sec" in run.stdout, run


@pytest.mark.parametrize("value", ["soon", "0", "nan", "inf"])
def test_the_budget_is_taken_from_the_environment(value, server, monkeypatch):
    url = server.new_url()
    monkeypatch.setenv("JAXINFRA_STORAGE_RETRY_S", "0.1")
    server.faults.down = True
    with pytest.raises(StorageError, match="All 6 retry attempts failed"):
        Storage(url).read("a")
    monkeypatch.setenv("JAXINFRA_STORAGE_RETRY_S", value)
    with pytest.raises(ConfigError, match=f"^JAXINFRA_STORAGE_RETRY_S={value}: "):
        Storage(url)


def test_a_folder_that_may_not_be_written_is_an_error_of_the_storage(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=f"^{tmp_path}/file/x/a: .*Not a directory"):
        Storage(tmp_path / "file" / "x").write("a", b"a")
