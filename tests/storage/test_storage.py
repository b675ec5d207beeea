"""Objects in folders, S3 and Google Cloud Storage: what is written is whole, and what is wrong is one line."""

import errno
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jaxinfra.config import read_record, write_record
from jaxinfra.data.store import arrays
from jaxinfra.errors import ConfigError, DataError, StorageError
from jaxinfra.storage import connection
from jaxinfra.storage.connection import normalize_url, require_server
from jaxinfra.storage.credentials import has_credentials, mask_credentials
from jaxinfra.storage.errors import cause_of, classify_error, storage_errors
from jaxinfra.storage.mirror import fetch
from jaxinfra.storage.objects import ObjectStore
from tests.refusals import raises
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
def store(server: Server, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    monkeypatch.setenv("JAXINFRA_STORAGE_RETRY_S", "4")
    return ObjectStore(server.new_url())


@pytest.fixture(params=["folder", "s3", "gcs"])
def url(request, tmp_path):
    """A URL of each kind where nothing is yet."""
    return tmp_path / "store" if request.param == "folder" else request.getfixturevalue(request.param).new_url()


def test_objects_are_written_read_and_listed(url):
    storage = ObjectStore(url)
    assert storage.list_names() == [] and not storage.exists("x/y")
    storage.write("x/y", b"one")
    storage.write("x/y", b"two")
    storage.child("x").write("z", b"")
    assert storage.exists("x/y")
    assert (storage.read("x/y"), storage.read("x/z")) == (b"two", b"")
    assert (storage.list_names(), storage.child("x").list_names()) == (["x/y", "x/z"], ["y", "z"])
    storage.check_sizes({"x/y": 3, "x/z": 0})
    with raises(DataError, f"{storage.url}/x/gone: "):
        storage.read("x/gone")
    storage.write("x/y", b"four")
    for sizes, named in [({"x/y": 4, "gone": 1}, "gone: missing"), ({"x/y": 3}, "x/y: 3"), ({"x/y": 9}, "x/y: 9")]:
        with raises(DataError, named):
            storage.check_sizes(sizes)


def test_no_update_of_several_at_once_is_lost(url):
    def add(number: int) -> None:
        for part in range(3):
            own = f"{number}.{part} ".encode()
            ObjectStore(url).atomic_update("list", lambda old, own=own: (old or b"") + own)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(4)))
    expected = [f"{number}.{part}" for number in range(4) for part in range(3)]
    assert sorted(ObjectStore(url).read("list").decode().split()) == expected


def test_an_upload_writes_the_named_last(server, store, folder):
    sent = []
    server.faults.after = lambda request: sent.append(request) if request.startswith(("PUT", "POST")) else None
    store.upload(folder, last=["a", "manifest.json"])
    assert {name: store.read(name) for name in store.list_names()} == FILES
    assert ["/a" in sent[-2] or "2Fa" in sent[-2], "manifest.json" in sent[-1]] == [True, True], sent


def _array(path: str) -> np.ndarray:
    tokens = np.random.default_rng(0).integers(0, 60_000, 3 * arrays.CHUNK + 17).astype(np.uint16)
    arrays.append(arrays.create(path, tokens.dtype), path, tokens)
    return tokens


def _read_array(path: str, length: int) -> np.ndarray:
    return arrays.read_ranges(arrays.open_array(path), path, [0], [length])


@pytest.mark.parametrize("fault", ["unavailable", "reset", "delay_s"])
def test_faults_on_the_way_change_nothing(fault, server, store, folder):
    setattr(server.faults, fault, 0.2 if fault == "delay_s" else 0.3)
    tokens = _array(store.url_of("tokens"))
    np.testing.assert_array_equal(_read_array(store.url_of("tokens"), len(tokens)), tokens)
    if fault != "delay_s":
        store.upload(folder, last=["manifest.json"])
        assert {name: store.read(name) for name in FILES} == FILES
    assert server.faults.requests > 3
    assert fault == "delay_s" or server.faults.fired > 0


def test_a_server_that_is_down_for_a_while_is_waited_for(server, store):
    store.write("x", b"x")
    server.faults.down_for(1)
    assert store.read("x") == b"x"
    assert server.faults.fired > 0


def test_a_server_that_is_down_beyond_the_budget_is_one_line_and_nothing_looks_whole(server, folder, monkeypatch):
    monkeypatch.setenv("JAXINFRA_STORAGE_RETRY_S", "0.2")
    store = ObjectStore(server.new_url())
    server.faults.down = True
    for call in [
        lambda: store.upload(folder, last=["manifest.json"]),
        lambda: store.read("a"),
        lambda: store.exists("a"),
        lambda: store.check_sizes(dict.fromkeys(FILES, 3)),
    ]:
        with raises(StorageError, f"{store.url}/ ABORTED retry"):
            call()
    server.faults.clear()
    assert store.list_names() == []


def test_a_manifest_is_not_written_while_files_are_missing(server, folder, monkeypatch):
    monkeypatch.setenv("JAXINFRA_STORAGE_RETRY_S", "0.05")
    store = ObjectStore(server.new_url())
    outcomes = []
    for share in (0.9, 0.7, 0.5, 0):
        server.faults.unavailable = share
        try:
            store.upload(folder, last=["manifest.json"])
            outcomes.append("whole")
        except StorageError:
            outcomes.append("failed")
        server.faults.clear()
        assert not store.exists("manifest.json") or set(store.list_names()) == set(FILES)
    assert outcomes[0] == "failed"
    assert outcomes[-1] == "whole"


def test_an_upload_that_failed_goes_on_with_what_is_missing(server, folder):
    sent = []
    server.faults.after = lambda request: sent.append(request) if request.startswith(("PUT", "POST")) else None
    store = ObjectStore(server.new_url())
    store.upload(folder, last=["manifest.json"])
    assert len(sent) == len(FILES)
    for change, missing in [
        (lambda: store._objects.write("a", None).result(), {"a"}),  # deletes it
        (lambda: store.write("deep/er/b", FILES["deep/er/b"][:-1] + b"?"), {"deep/er/b"}),
        (lambda: store.write("deep/er/b", b"short"), {"deep/er/b"}),
        (lambda: store.write("empty", b"not"), {"empty"}),
        (lambda: None, set()),
    ]:
        change()
        sent.clear()
        store.upload(folder, last=["manifest.json"], resume=True)
        assert len(sent) == len(missing | {"manifest.json"})
        assert {name: store.read(name) for name in store.list_names()} == FILES


@pytest.mark.parametrize("kept", [0, 2000], ids=["lost", "cut"])
def test_what_the_storage_loses_is_noticed_before_the_last_files_are_written(kept, server, store, folder):
    def lose(request: str) -> None:
        if request.startswith(("PUT", "POST")) and request.endswith("b"):
            server.put(store.url_of("deep/er/b"), FILES["deep/er/b"][:kept])

    server.faults.after = lose
    with raises(StorageError, f"{store.url}/deep/er/b: "):
        store.upload(folder, last=["manifest.json"])
    assert not store.exists("manifest.json")


@pytest.mark.parametrize("call", ["read", "exists", "list_names"])
def test_a_missing_bucket_of_s3_is_said(call, s3):
    with raises(StorageError, "s3://no-such-bucket/store create the bucket"):
        getattr(ObjectStore("s3://no-such-bucket/store"), call)(*([] if call == "list_names" else ["a"]))


def test_nothing_is_written_to_a_missing_bucket(server):
    url = f"{server.scheme}://no-such-bucket/store"
    with raises(StorageError, f"{url}/a: "):
        ObjectStore(url).write("a", b"a")


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
    code = "import sys; from jaxinfra.storage.objects import ObjectStore; ObjectStore(sys.argv[1]).write('a', b'a')"
    url = s3.new_url()
    run = subprocess.run([sys.executable, "-c", code, url], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    assert s3.get(f"{url}/a") == b"a"
    assert s3.secret not in run.stdout + run.stderr


@pytest.fixture
def no_proxy(monkeypatch):
    """No proxy, no other server of S3 or Google, and a short pause before a server is asked again."""
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "TENSORSTORE_GCS_HTTP_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(connection, "getproxies", dict)
    monkeypatch.setattr(connection, "_PAUSE_S", 0.01)


def test_a_server_that_is_not_there_is_told_and_a_slow_one_is_not(no_proxy, monkeypatch, tmp_path, capfd):
    with socket.create_server(("127.0.0.1", 0)) as slow:  # it never answers
        url = f"http://127.0.0.1:{slow.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        require_server("s3://bucket/slow")
    connection._connect_twice.cache_clear()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    for call in (lambda: fetch("s3://bucket/x", ["run.json"], tmp_path), lambda: read_record("s3://b/x")):
        with raises(StorageError, f"s3://b {url}"):
            call()
    assert not capfd.readouterr().err, "TensorStore has looked for credentials, and printed where"
    monkeypatch.setattr(connection, "_CONNECT_S", 0.01)
    monkeypatch.setattr(connection, "_refusal", lambda host, port: time.sleep(1))
    begin_s = time.monotonic()
    require_server("s3://another/silent")
    require_server("gs://another/silent")
    assert time.monotonic() < begin_s + 0.9


def test_a_server_that_refuses_once_is_not_missing(no_proxy, monkeypatch):
    with socket.socket() as starting:
        starting.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{starting.getsockname()[1]}")
        monkeypatch.setattr(connection, "time", SimpleNamespace(sleep=lambda seconds: starting.listen()))
        require_server("s3://bucket/x")


def test_the_server_that_a_bucket_needs_is_asked_and_none_for_a_folder(no_proxy, monkeypatch, tmp_path):
    asked = []

    def refuse(address, **options):
        asked.append("{}:{}".format(*address))
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", refuse)
    for name, server, url in (
        ("AWS_ENDPOINT_URL", "", "s3://bucket/x"),
        ("AWS_ENDPOINT_URL", "http://minio:9000", "s3://bucket/x"),
        ("AWS_ENDPOINT_URL", "http://minio", "s3://bucket/x"),
        ("TENSORSTORE_GCS_HTTP_URL", "https://gateway", "gs://bucket/x"),
    ):
        monkeypatch.setenv(name, server)
        with raises(StorageError, f"{url}: {server}"):
            require_server(url)
    assert asked[::2] == asked[1::2] == ["bucket.s3.amazonaws.com:443", "minio:9000", "minio:80", "gateway:443"]
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://minio:port")  # TensorStore refuses it
    require_server("s3://bucket/x")
    write_record(tmp_path / "run.json", {"format": 1, "config": {}, "root": "x"})
    assert read_record(f"file://{tmp_path}/run.json")["root"] == "x" and len(asked) == 8


def test_urls_are_understood_or_refused(monkeypatch, tmp_path):
    assert normalize_url("gs://bucket/a/b/") == "gs://bucket/a/b"
    assert normalize_url("file:///a/b") == "/a/b"
    assert normalize_url("~/b") == str(Path.home() / "b")
    (tmp_path / "deep" / "folder").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "folder")
    assert normalize_url(f"{tmp_path}/link/../x") == str((tmp_path / "deep" / "x").resolve()), "as the system reads it"
    assert normalize_url(f"{tmp_path}/link") == f"{tmp_path}/link"
    for url in ("http://host/store", "s3:///store", "abc://x/y"):
        with raises(ConfigError, f"{url}: s3://BUCKET/PREFIX"):
            normalize_url(url)
    assert normalize_url("file://localhost/a/b") == "/a/b"
    with raises(ConfigError, "file://a/b: file:///a/b"):
        normalize_url("file://a/b")
    for url in ("s3://user:sEcReT@bucket/x", "file://user:sEcReT@/x", "s3://bucket:80/x"):
        with raises(ConfigError) as caught:
            normalize_url(url)
        assert "sEcReT" not in str(caught.value)
    with raises(ConfigError, "s3://B/x: "):
        ObjectStore("s3://B/x")
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.setenv(name, "http://user:sEcReT@host")
        with raises(ConfigError, f"{name}: ") as caught:
            ObjectStore("s3://bucket/x")
        assert "sEcReT" not in str(caught.value)


_SILENT = """
import os, socket
from jaxinfra.errors import StorageError
from jaxinfra.storage import connection, objects
with socket.socket() as silent:
    silent.bind(("127.0.0.1", 0))
    silent.listen(50)
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{silent.getsockname()[1]}"
    os.environ["JAXINFRA_STORAGE_RETRY_S"] = "0.1"
    connection._TIMEOUTS["TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS"] = "1"
    try:
        objects.ObjectStore("s3://bucket/x").read("a")
    except StorageError as error:
        print(error)
"""


@pytest.mark.slow
def test_a_server_that_says_nothing_has_failed(s3_server):
    given = os.environ | dict(s3_server.environment) | {"AWS_SECRET_ACCESS_KEY": "b"}
    environment = {k: v for k, v in given.items() if k != "AWS_ENDPOINT_URL_S3" and "_CURL_" not in k}
    code = [sys.executable, "-c", _SILENT]
    run = subprocess.run(code, capture_output=True, text=True, timeout=600, env=environment)
    assert "s3://bucket/x/a: " in run.stdout and "All 6 retry attempts failed: CURL error" in run.stdout, run
    assert "1 bytes/sec" in run.stdout, run


@pytest.mark.parametrize("value", ["soon", "0", "nan", "inf"])
def test_the_budget_is_taken_from_the_environment(value, server, monkeypatch):
    url = server.new_url()
    monkeypatch.setenv("JAXINFRA_STORAGE_RETRY_S", "0.1")
    server.faults.down = True
    with raises(StorageError, "All 6 retry attempts failed"):
        ObjectStore(url).read("a")
    monkeypatch.setenv("JAXINFRA_STORAGE_RETRY_S", value)
    with raises(ConfigError, f"JAXINFRA_STORAGE_RETRY_S={value}: "):
        ObjectStore(url)


def test_a_folder_that_may_not_be_written_is_an_error_of_the_storage(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with raises(StorageError, f"{tmp_path}/file/x/a: Not a directory"):
        ObjectStore(tmp_path / "file" / "x").write("a", b"a")


STATUS = "{}: Error reading \"x\" [source locations='a.cc:1\\nb.cc:2']"


class ClientError(Exception):
    """As the clients of fsspec raise, by its module."""


ClientError.__module__ = "botocore.exceptions"


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (OSError(errno.EACCES, os.strerror(errno.EACCES)), "Permission denied"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device"),
        (FileNotFoundError("bucket/x"), "No such file or directory"),
        (ValueError("UNKNOWN: failed [os_error_code='28']"), "No space left on device"),
        (ValueError(STATUS.format("UNAVAILABLE")), 'UNAVAILABLE: Error reading "x"'),
        (ClientError("a\nb sEcReT-value"), "a b $AWS_SESSION_TOKEN"),
    ],
)
def test_a_failure_of_storage_is_one_line(error, cause, monkeypatch):
    monkeypatch.setenv("AWS_SESSION_TOKEN", "sEcReT-value")
    with pytest.raises(StorageError) as caught, storage_errors("s3://a:sEcReT@b/x"):
        raise error
    assert str(caught.value).startswith(f"s3://***@b/x: cannot be written: {cause}; ")
    assert "\n" not in str(caught.value) and cause_of(error) == cause


def test_a_clock_that_is_off_is_named():
    """S3 refuses requests with such a time, which TensorStore retries as if it was busy."""
    error = ValueError("ABORTED: All 12 retry attempts failed: RequestTimeTooSkewed: The difference is too large.")
    assert "clock of this host" in str(classify_error("s3://b/x", error))


def test_other_exceptions_pass_and_what_is_missing_is_an_error_of_the_config():
    for error in (ValueError("X: y"), RuntimeError("x"), DataError("x")):
        with pytest.raises(type(error)) as caught, storage_errors("x"):
            raise error
        assert caught.value is error
    with pytest.raises(ConfigError) as caught, storage_errors("x", missing="path=http://a:b@h/x"):
        raise FileNotFoundError("x")
    assert str(caught.value) == "path=http://***@h/x"


@pytest.mark.parametrize(
    ("status", "writing", "kind"),
    [
        ("NOT_FOUND", False, DataError),
        ("DATA_LOSS", False, DataError),
        ("NOT_FOUND", True, StorageError),
        ("PERMISSION_DENIED", False, StorageError),
        ("FAILED_PRECONDITION: x [http_response_code='403']", False, StorageError),
        ("NOT_FOUND: x [http_response_code='404']", False, DataError),
        ("NOT_FOUND: NoSuchBucket [http_response_code='404']", False, StorageError),
    ],
)
def test_damaged_data_is_told_from_storage_that_refuses(status, writing, kind):
    assert type(classify_error("s3://b/x", ValueError(status + ": x"), writing=writing)) is kind


def test_a_user_alone_is_masked_where_it_may_be_a_token(monkeypatch):
    for text in (
        "https://sEcReT@host/x",
        "s3://sEcReT@bucket/x",
        "https://h/x?access_token=sEcReT",
        "https://h/x?key=sEcReT",
        "http://u:p@sEcReT/w0rd@host/x",
        "http://u:sEcReT@1/2@host",
        "http://u:123456/sEcReT@host",
    ):
        assert has_credentials(text) and "sEcReT" not in mask_credentials(text)
    for text in ("abfs://container@account.dfs.core.windows.net/x", "sftp://user@host/x", "a@b", "http://h:80/x@y"):
        assert not has_credentials(text) and mask_credentials(text) == text
    monkeypatch.setenv("HF_TOKEN", "sEcReT-token")
    assert mask_credentials("refused: sEcReT-token") == "refused: $HF_TOKEN" and not has_credentials("sEcReT-token")
    for header in ("Authorization: Bearer sEcReT-x", "{'Authorization': 'Basic sEcReT-x'}", "bearer sEcReT-x"):
        assert mask_credentials(header).replace("***", "sEcReT-x") == header != mask_credentials(header)
        assert not has_credentials(header)
    assert "sEcReT" not in mask_credentials("AccountName=a;AccountKey=sEcReT;x")
    assert not has_credentials("a prompt; key=value")
    for name in ("TOKEN", "PGPASSWORD", "MINIO_SECRET_KEY", "SMTP_PASS"):
        monkeypatch.setenv(name, secret := f"sEcReT-{name}")
        assert mask_credentials(f"refused: {secret}") == f"refused: ${name}"
