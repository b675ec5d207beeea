"""Stores in buckets are the same bytes as in folders, through faults, and say in one line what is wrong."""

from pathlib import Path

import numpy as np
import pytest

from jaxinfra.data.store import arrays
from jaxinfra.data.store.store import TokenStore
from jaxinfra.data.store.versions import list_versions
from jaxinfra.errors import DataError, StorageError
from jaxinfra.prepare.prepare import prepare
from jaxinfra.storage import connection
from jaxinfra.storage.objects import ObjectStore
from tests.refusals import names, raises, refused
from tests.stores import bytes_recipe, contents, jsonl, recipe_file, what_it_holds
from tests.tiny_run import ended, launch, start
from tests.tiny_run import tiny as tiny
from tests.tiny_run import tiny_data as tiny_data


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lines")
    jsonl(folder, [f"{number} " + "naïve 漢字 " * (number % 30) for number in range(300)])
    return folder


@pytest.fixture
def written(tmp_path, source):
    """The file of a recipe of it."""
    return lambda store: recipe_file(
        tmp_path, store, f"Jsonl(root={str(source)!r})", f"work_dir={str(tmp_path / 'work')!r}"
    )


@pytest.fixture(scope="module")
def local(source, tmp_path_factory):
    """The same store in a folder."""
    return prepare(bytes_recipe(source, tmp_path_factory.mktemp("store") / "store"), workers=1)


@pytest.fixture
def recipe(server, source, tmp_path):
    return bytes_recipe(source, server.new_url(), work_dir=str(tmp_path / "work"))


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setenv("JAXINFRA_STORAGE_RETRY_S", "0.2")


@pytest.fixture
def new_context():
    """TensorStore reads the credentials of a context once."""
    connection._cached_context.cache_clear()
    yield
    connection._cached_context.cache_clear()


def objects(url: str) -> tuple[dict[str, bytes], dict[str, object]]:
    """As `contents` of a folder."""
    storage = ObjectStore(url)
    found = {name: storage.read(name) for name in storage.list_names()}
    return found, what_it_holds(found.pop("manifest.json"))


def assert_same(made, local):
    assert objects(made.path) == contents(Path(local.path))
    here, there = TokenStore.open(local.path), TokenStore.open(made.path)
    for split in ("train", "validation"):
        tokens = here.manifest.splits[split].tokens
        starts = np.random.default_rng(0).integers(0, tokens - 100, 50)
        np.testing.assert_array_equal(here.read(split, starts, 100), there.read(split, starts, 100))


def test_a_store_in_a_bucket_is_the_same_bytes(recipe, local):
    made = prepare(recipe, workers=1)
    assert made.path.startswith(recipe.store) and made.new
    assert made.manifest.fingerprint == local.manifest.fingerprint
    assert_same(made, local)
    assert not prepare(recipe, workers=1).new
    done = launch("data", "verify", recipe.store)
    assert done.code == 0 and "every hash fits" in done.out, done


def test_a_server_that_goes_down_leaves_no_version_and_the_next_call_goes_on(server, recipe, local, impatient):
    def stop(progress):
        server.faults.down = progress.stage == "publish"

    with raises(StorageError, f"{recipe.store}/"):
        prepare(recipe, workers=1, on_progress=stop)
    server.faults.clear()
    assert list_versions(ObjectStore(recipe.store)) == [] == ObjectStore(recipe.store).list_names()
    stages = []
    made = prepare(recipe, workers=1, on_progress=lambda progress: stages.append((progress.stage, progress.tokens)))
    assert all(tokens == 0 for _, tokens in stages)  # none was made again
    assert_same(made, local)


def test_a_server_that_goes_down_while_it_is_read_is_one_line(server, recipe, impatient):
    store = TokenStore.open(prepare(recipe, workers=1).path)
    server.faults.down = True
    with raises(StorageError, "/train/tokens/zarr.json: ABORTED"):
        store.read("train", [0], 100)
    refused(launch("data", "verify", recipe.store), f"{recipe.store}/versions.json: ABORTED", code=82)


@pytest.mark.parametrize("damage", [lambda content: content[:-3], lambda content: content + b"x"])
def test_an_object_of_another_length_is_found_when_the_store_is_opened(server, recipe, damage):
    made = prepare(recipe, workers=1)
    shard = f"{made.path}/train/tokens/c/0"
    server.put(shard, damage(server.get(shard)))
    with raises(DataError, f"{shard}: bytes"):
        TokenStore.open(recipe.store)


def test_a_flipped_bit_is_found_when_it_is_read_and_named_by_verify(server, recipe):
    made = prepare(recipe, workers=1)
    shard = f"{made.path}/train/tokens/c/0"
    content = bytearray(server.get(shard))
    content[1000] ^= 4
    server.put(shard, bytes(content))
    with raises(DataError, f"{shard}: block 0 documents"):
        TokenStore.open(recipe.store).read("train", [0], 5000)
    refused(launch("data", "verify", recipe.store), "train/tokens block 0", code=78)


def test_an_object_that_is_wrong_once_is_read_again(server, recipe, monkeypatch, caplog):
    made = prepare(recipe, workers=1)
    expected = TokenStore.open(recipe.store).read("train", [0], 5000)
    shard = f"{made.path}/train/tokens/c/0"
    whole = server.get(shard)
    server.put(shard, whole[:1000] + bytes([whole[1000] ^ 4]) + whole[1001:])
    store, open_array = TokenStore.open(recipe.store), arrays.open_array

    def open_again(path, *, cached=True):
        if not cached:
            server.put(shard, whole)
        return open_array(path, cached=cached)

    monkeypatch.setattr(arrays, "open_array", open_again)
    np.testing.assert_array_equal(store.read("train", [0], 5000), expected)
    (line,) = caplog.messages
    names(line, f"{made.path}/train/tokens: block 0")


@pytest.mark.usefixtures("new_context")
@pytest.mark.parametrize(
    "wrong", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "GOOGLE_AUTH_TOKEN_FOR_TESTING"]
)
def test_wrong_credentials_are_one_line_and_stand_nowhere(wrong, request, written, tmp_path, monkeypatch):
    server = request.getfixturevalue("gcs" if wrong.startswith("GOOGLE") else "s3")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "sEcReT-token")
    monkeypatch.setenv(wrong, "nobody" if wrong == "AWS_ACCESS_KEY_ID" else "sEcReT-wrong")
    url = server.new_url()
    for command in (["prepare", written(url)], ["verify", url], ["show", url]):
        # A process of its own: libraries of C++ write to its terminal, too.
        done = ended(start("data", *command))
        assert done.code == 82
        names(done.err.splitlines()[-1], f"error: {url}/versions.json: credentials allowed")
        assert "sEcReT" not in done.out + done.err
    assert all(b"sEcReT" not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    if server.scheme == "s3":  # Google's token is read once a process
        for call, *content in (("write", b"a"), ("exists",), ("read",)):
            with raises(StorageError, f"{url}/a: credentials allowed"):
                getattr(ObjectStore(url), call)("a", *content)


def test_right_credentials_stand_nowhere(s3, written):
    url = s3.new_url()
    done = launch("data", "prepare", written(url), "--workers", "1")
    assert done.code == 0, done
    assert s3.secret not in done.out + done.err
    store = ObjectStore(url)
    assert all(s3.secret.encode() not in store.read(name) for name in store.list_names())


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
def test_a_url_with_credentials_is_refused_without_showing_them(url, written):
    for command in (["prepare", written(url)], ["verify", url], ["show", url]):
        done = launch("data", *command)
        refused(done, "credentials")
        assert "sEcReT" not in done.out + done.err


@pytest.mark.slow
def test_a_run_reads_a_bucket_as_it_reads_a_folder(server, tiny, tmp_path):
    assert tiny.launch().code == 0
    expected = tiny.losses()
    store = ObjectStore(server.new_url())
    local = Path(tiny.loaded().data.store)
    store.upload(local, last=["versions.json"])
    server.faults.unavailable = 0.2
    assert tiny.launch(f"data.store={store.url}", "name=elsewhere").code == 0
    assert tiny.losses("elsewhere") == expected
    assert server.faults.fired > 0
    record = b"".join(path.read_bytes() for path in tiny.directory("elsewhere").rglob("*") if path.is_file())
    assert server.secret.encode() not in record and store.url.encode() in record


@pytest.mark.slow
def test_a_server_that_goes_down_ends_a_run_and_its_next_start_goes_on(s3, tiny, impatient, monkeypatch):
    few = "data.prefetch_bytes=5000"
    assert tiny.launch(few).code == 0
    expected = tiny.losses()
    store = ObjectStore(s3.new_url())
    store.upload(Path(tiny.loaded().data.store), last=["versions.json"])
    monkeypatch.setattr("jaxinfra.data.store.arrays.CACHE_BYTES", 0)  # every batch is asked for
    reads = []

    def look(request):
        reads.extend([request] * ("/train/tokens/c/0" in request))
        s3.faults.down = len(reads) > 9

    s3.faults.after = look
    arguments = (f"data.store={store.url}", "name=elsewhere", few)
    refused(tiny.launch(*arguments), f"{store.url}/ ABORTED", code=82)
    done = tiny.losses("elsewhere")
    assert 0 < len(done) < len(expected)
    s3.faults.clear()
    assert tiny.launch(*arguments).code == 0
    assert tiny.losses("elsewhere") | done == expected
